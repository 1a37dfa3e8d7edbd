"""Baselines and evaluation: each number is compared with an analytic or independent value."""

import itertools
import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flm
from data import UserError
from extras import baselines, evaluate

CPU = torch.device("cpu")

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def network(kind, V, L, **settings):
    """A small network with random weights in every layer."""
    sizes = dict(depth=2, width=16, heads=2, cond_width=8, seq_len=L, condition_prob=0.5)
    model = baselines.NETWORKS[kind](flm.Config(**(sizes | settings)), V)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)

@pytest.mark.parametrize("settings", [
    dict(packing=False), dict(packing=True), dict(attention_cap=5.0), dict(L=80, packing=False)])
def test_ar_is_causal_and_its_cache_changes_nothing(settings, monkeypatch):
    """To float32 rounding. Later tokens do change when an earlier one does."""
    model = network("ar", 7, **(dict(L=12) | settings))
    drawn, draw = [], flm.draw_tokens
    monkeypatch.setattr(flm, "draw_tokens", lambda p, u: drawn.append(p) or draw(p, u))
    tokens = baselines.ar_sample(model, 3, 0, seed=1)
    nats = baselines.ar_nats(model, tokens)
    cached = torch.stack(drawn, 1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(-cached.log(), nats, atol=2e-5)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 7
    difference = (baselines.ar_nats(model, changed) - nats).abs()
    assert difference[:, :5].max() == 0 and difference[:, 5:].min(1).values.max() > 1e-6

def test_ar_samples_have_the_probabilities_of_the_full_network():
    """Each of the 27 texts, within 4.5 binomial standard errors. Text i does not depend on n."""
    model, n = network("ar", 3, 3, packing=False), 20_000
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = baselines.ar_nats(model, every).sum(1).neg().exp()
    texts = baselines.ar_sample(model, n, 0, seed=5)
    counts = (texts[:, None] == every).all(2).sum(0)
    assert abs(p.sum() - 1) < 1e-5
    assert ((counts - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt()).all()
    assert torch.equal(texts[:10], baselines.ar_sample(model, 10, 0, seed=5))
    nats = baselines.ar_nats(model, torch.tensor([[1, 2, 0], [2, 0, 0]]))
    expected = math.exp((nats[0].sum() + nats[1, 0]) / 4)
    assert abs(evaluate.ar_judge(model)([(1, 2, 0), (2,)]) / expected - 1) < 1e-5
    known = torch.tensor([2, -1, -1])
    greedy = baselines.ar_sample(model, 1, 0, seed=6, temperature=1e-4, known=known)[0].tolist()
    p = p.view(3, 3, 3)[2]
    assert greedy == [2, p.sum(1).argmax(), p[p.sum(1).argmax()].argmax()]

def test_the_bound_of_an_untrained_mdlm_is_log_v():
    """Of L n tokens with weights 1/m, m = 1 - tau > 1/n: error log V ((ln n - 1)/(L n))^.5."""
    V, L, n = 9, 16, 4000
    model = network("mdlm", V, L)
    for p in model.head.parameters():
        torch.nn.init.zeros_(p)
    nats, tau = baselines.mdlm_loss(model, torch.randint(V, (n, L)), flm.Rows(0, 0, range(n), n))
    error = math.log(V) * math.sqrt((math.log(n) - 1) / (L * n))
    assert (tau * n).long().tolist() == list(range(n))
    assert abs(nats.mean() - math.log(V)) < 3 * error < 0.1

class Phrases:
    """The exact mdlm of "new york" (tokens 0 1) and "san diego" (2 3), which are equally likely."""
    config, V, device, takes_prompts = SimpleNamespace(seq_len=2), 4, CPU, True
    mask = torch.zeros(4)
    def clean(self, tokens):
        return F.one_hot(tokens, 4).float()
    def __call__(self, state, tau):
        phrases = self.clean(torch.tensor([[0, 1], [2, 3]]))
        agree = torch.einsum("blv,klv->bk", state, phrases) == state.sum((1, 2))[:, None]
        return torch.einsum("bk,klv->blv", agree.float(), phrases).clamp(min=1e-30).log()

def test_mdlm_mixes_phrases_if_it_unmasks_both_tokens_in_one_step():
    """Probability 1/K in K steps, and half of these are mixed: within 4 standard errors."""
    n = 20_000
    for steps in (1, 2, 4, 16):
        first, second = baselines.mdlm_sample(Phrases(), n, steps, seed=2).T
        p = 1 / (2 * steps)
        assert abs((second != first + 1).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert abs((first == 0).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    filled = baselines.mdlm_sample(Phrases(), 50, 1, 0, known=torch.tensor([-1, 3]))
    assert filled.tolist() == [[2, 3]] * 50

class ExactSource:
    """Bayes' rule for one position with token probabilities p, from states x E."""
    def __init__(self, p, E):
        self.p, self.embedding, self.V, self.clock = p, E, len(E), flm.Clock(len(E))
        self.config = SimpleNamespace(width=E.shape[1])
    def factor(self):
        return torch.linalg.cholesky(self.embedding.T @ self.embedding)
    def noise(self, rows):
        return rows.normal((1, self.V), CPU) @ self.embedding
    def clean(self, x):
        return (x if x.is_floating_point() else F.one_hot(x, self.V).float()) @ self.embedding
    def __call__(self, state, tau):
        t = self.clock.t(tau)[:, None, None]
        away = (state - t * self.embedding) @ torch.linalg.inv(self.factor()).T  # (B, V, D)
        return (self.p.log() - away.square().sum(-1) / (2 * (1 - t[..., 0]) ** 2))[:, None]

@pytest.mark.parametrize("E", [torch.eye(5), torch.randn(5, 3, generator=torch.Generator())])
def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_source(E):
    """By the identity of information and mean squared error (Guo et al. 2005)."""
    p, n = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]), 100_000
    tokens = p.multinomial(n, replacement=True)[:, None]
    nats, _ = evaluate.likelihood_bound(ExactSource(p, E), tokens, flm.Rows(0, 0, range(n), n))
    error = nats.std() / math.sqrt(n)
    assert abs(nats.mean() + (p * p.log()).sum()) < 3 * error < 0.1

def test_ngrams_equal_a_hand_count_and_are_distributions():
    """Texts aa0 and ab0: bigrams ^a 2, aa 1, ab 1, a0 1, b0 1 with D = n1 / (n1 + 2 n2) = 4/6.

    Unigrams count the tokens before them: a {^, a}, b {a}, 0 {a, b}: D = 1/5, and V = 3.
    """
    judge = evaluate.NGram([[1, 1, 0], [1, 2, 0]], V=3, order=2)
    rest = 3 / 5 / 5 / 3
    a, b, end = (2 - 1 / 5) / 5 + rest, (1 - 1 / 5) / 5 + rest, (2 - 1 / 5) / 5 + rest
    first, then = (2 - 2 / 3) / 2 + 2 / 3 / 2 * a, (1 - 2 / 3) / 3 + 2 / 3 * end
    assert abs(judge.probability([], 1) - first) < 1e-12
    assert abs(judge.probability([1], 2) - (1 - 2 / 3) / 3 - 2 / 3 * b) < 1e-12
    assert abs(judge.perplexity([(1, 0)]) - (first * then) ** -0.5) < 1e-12
    rows = torch.randint(1, 6, (200, 6)).tolist()
    judge = evaluate.NGram([row[: 1 + i % 6] + [0] for i, row in enumerate(rows)], V=7, order=4)
    for context in ([], rows[0][:2], rows[1][:3], [6, 6, 6], [5]):
        assert abs(sum(judge.probability(context, token) for token in range(7)) - 1) < 1e-12

def test_baselines_are_trained_sampled_and_evaluated(folder, capsys):
    """One table row per model, number of steps and temperature, and the figures of the files."""
    def run(program, line):
        program.main(shlex.split(f"{line} --run-dir r"))
    run(flm, "--dataset a.txt --tokenizer chars --no-packing --seq-len 10 --condition-prob 0.3 "
        "--depth 1 --width 16 --heads 2 --batch-size 8 --max-steps 6 --device cpu")
    for kind in ("ar", "mdlm"):
        run(baselines, f"--model {kind} --eval-every 4")
        model = baselines.load(f"r/{kind}.pt")
        assert model.step == model.config.max_steps == 6 and model.kind == kind
        written = []
        for flags in ("--seed 1", "--seed 1", "--seed 2", "--temperature 0.01"):
            capsys.readouterr()
            run(baselines, f"--sample --model {kind} --prompt on {flags}")
            written.append(capsys.readouterr().out)
        assert written[0] == written[1] and len(set(written)) == 3
        assert all(line.startswith("on") for line in written[0].splitlines())
    evaluate.main(shlex.split("r r --steps 1 3 --num-samples 20 --temperatures 0.5"))
    report = json.loads(Path("r/quality.json").read_text())
    rows = {(row["model"], row["steps"], row["temperature"]): row for row in report["samples"]}
    assert len(rows) == len(report["samples"]) == 1 + 2 + 2 * 2 + 2 + 2 * 2
    assert f"{rows['mdlm', 3, 0.5]['perplexity']:.4g}" in capsys.readouterr().out
    assert Path("r/quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(report["infilling"]) == 3 * (1 + 1 + 2)
    text = evaluate.load_run(Path("r"), "ngram", CPU)[1]
    hidden = evaluate.hide(text, text.rows, 0.5, 0) < 0
    assert not (hidden & (text.rows == text.end)).any()
    assert abs(hidden.sum() / (text.rows != text.end).sum() - 0.5) < 0.1
    text.end, text.heldout = 0, [(1, 2, 0)]  # bigrams 12 and 20, against 12, 22 and 20
    measured = text.measure(len, torch.tensor([[1, 2, 2, 0, 0]] * 2))
    assert (measured["length"], measured["distinct"], measured["held_out"]) == (4, 0.5, 0)
    assert abs(measured["variation"] - 1 / 3) < 1e-9 > abs(measured["bigrams"] - math.log(3))
    assert abs(measured["entropy"] - math.log(4) * 3 / 4) < 1e-9  # frequencies 1/4, 1/2, 1/4

def test_perplexity_is_interpolated_and_never_extrapolated():
    """Entropies 1 and 3 with perplexities e and e^3: e^2 at 2. The map's entropy 4 is outside."""
    def row(model, entropy, temperature=1.0, steps=1):
        return dict(model=model, steps=steps, temperature=temperature, entropy=entropy,
                    perplexity=math.exp(entropy))
    table = [row("held-out text", 2.0), row("fmlm", 4.0), row("mdlm", 3.0), row("mdlm", 1.0, 0.5)]
    evaluate.at_equal_entropy(table)
    assert abs(table[2]["at_held_out"] - math.exp(2)) < 1e-9 and "at_map" not in table[2]
    assert "at_held_out" not in table[1] and table[1]["at_map"] == table[1]["perplexity"]
    merged = evaluate.over_runs([[row("mdlm", 1.0)], [row("mdlm", 3.0)]])[0]
    assert (merged["entropy"], merged["steps"]) == (2, 1) and merged["entropy_sd"] == 2**0.5

@pytest.mark.parametrize("program, line, message", [
    (baselines, "--run-dir none", "none/flm.pt: no such checkpoint"),
    (baselines, "--model gpt", "invalid choice: 'gpt'"),
    (evaluate, "--steps 4 0", r"--steps \[4, 0\]: must be greater than 0")])
def test_mistakes_of_the_user(folder, program, line, message):
    with pytest.raises(UserError, match=message):
        program.main(shlex.split(line))
