"""Baselines and evaluation: each number is compared with an analytic or independent value."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import flm
from data import UserError
from extras import baselines, evaluate
from test_flm import CPU, PHRASES, TINY, TOKENS, Source, network, run

@pytest.mark.parametrize("settings", [
    dict(packing=False), dict(), dict(seq_len=80, packing=False)])
def test_ar_is_causal_and_its_cache_changes_nothing(settings, monkeypatch):
    """To float32 rounding. Later tokens do change when an earlier one does."""
    model = network(7, baselines.AR, **(dict(seq_len=12) | settings))
    drawn, draw = [], baselines.draw
    def recording(logits, generator):
        drawn.append(logits.softmax(-1))
        return draw(logits, generator)
    monkeypatch.setattr(baselines, "draw", recording)
    tokens = baselines.ar_sample(model, 3, 0, seed=1)
    nats = baselines.ar_nats(model, tokens)
    cached = torch.stack(drawn, 1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(-cached.log(), nats, atol=2e-5)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 7
    difference = (baselines.ar_nats(model, changed) - nats).abs()
    assert difference[:, :5].max() == 0 and difference[:, 5:].min(1).values.max() > 1e-6

def test_ar_samples_have_the_probabilities_of_the_full_network():
    """Each of the 27 texts, within 4.5 binomial standard errors."""
    model, n = network(3, baselines.AR, seq_len=3, packing=False), 20_000
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = baselines.ar_nats(model, every).sum(1).neg().exp()
    texts = baselines.ar_sample(model, n, 0, seed=5)
    counts = (texts[:, None] == every).all(2).sum(0)
    assert abs(p.sum() - 1) < 1e-5
    assert ((counts - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt()).all()
    nats = baselines.ar_nats(model, torch.tensor([[1, 2, 0], [2, 0, 0]]))
    expected = ((nats[0].sum() + nats[1, 0]) / 4).exp().item()
    assert abs(evaluate.ar_judge(model)([(1, 2, 0), (2,)]) / expected - 1) < 1e-5
    known = torch.tensor([2, -1, -1])
    greedy = baselines.ar_sample(model, 1, 0, seed=6, temperature=1e-4, known=known)[0].tolist()
    p = p.view(3, 3, 3)[2]
    assert greedy == [2, p.sum(1).argmax(), p[p.sum(1).argmax()].argmax()]
    with pytest.raises(UserError, match="fills no gaps"):
        baselines.ar_sample(model, 1, 0, seed=6, known=torch.tensor([2, -1, 1]))

def test_the_bound_of_an_untrained_mdlm_is_log_v():
    """Of L n tokens with weights 1/m, m = 1 - tau > 1/n: error log V ((ln n - 1)/(L n))^.5."""
    V, L, n = 9, 16, 4000
    model = network(V, baselines.Baseline, seq_len=L)
    for p in model.head.parameters():
        torch.nn.init.zeros_(p)
    nats, tau = baselines.mdlm_loss(model, torch.randint(V, (n, L)))
    error = math.log(V) * math.sqrt((math.log(n) - 1) / (L * n))
    assert ((n * tau.double() - torch.arange(n) - 0.5).abs() < 0.501).all()  # float32 rounding
    assert abs(nats.mean() - math.log(V)) < 3 * error < 0.1

class Phrases(Source):
    """The exact mdlm of two equally likely texts: tokens that are not masked decide."""

    blank = torch.zeros(4)

    def forward(self, state, tau):
        score = 1000 * torch.einsum("blv,nlv->bn", state, self.one_hot)
        probs = torch.einsum("bn,nlv->blv", score.softmax(-1), self.one_hot)
        return probs.clamp(min=1e-30).log()

def test_mdlm_mixes_phrases_if_it_unmasks_both_tokens_in_one_step():
    """Probability 1/K in K steps, and half of these are mixed: within 4 standard errors."""
    n = 20_000
    for steps in (1, 2, 4, 16):
        first, second = baselines.mdlm_sample(Phrases(*PHRASES), n, steps, seed=2).T
        p = 1 / (2 * steps)
        assert abs((second != first + 1).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert abs((first == 0).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    filled = baselines.mdlm_sample(Phrases(*PHRASES), 50, 1, 0, known=torch.tensor([-1, 3]))
    assert filled.tolist() == [[2, 3]] * 50

@pytest.mark.parametrize("E", [torch.eye(5), torch.randn(5, 3, generator=torch.Generator())])
def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_source(E):
    """By the identity of information and mean squared error (Guo et al. 2005)."""
    p, n = TOKENS[1], 100_000
    tokens = p.multinomial(n, replacement=True)[:, None]
    nats, _ = evaluate.likelihood_bound(Source(*TOKENS, E), tokens)
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
    run(flm, f"{TINY} --width 12 --condition-prob 0.3 --max-steps 6 --run-dir r")
    for kind in ("ar", "mdlm"):
        run(baselines, f"--run-dir r --model {kind} --eval-every 4")
        content = flm.load_checkpoint(Path(f"r/{kind}.pt"))
        assert content["step"] == content["config"]["max_steps"] == 6 and content["kind"] == kind
        written = []
        for flags in ("--seed 1", "--seed 1", "--seed 2", "--temperature 0.01"):
            capsys.readouterr()
            run(baselines, f"--run-dir r --sample --model {kind} --prompt ab {flags}")
            written.append(capsys.readouterr().out)
        assert written[0] == written[1] and len(set(written)) == 3
        assert all(line.startswith("ab") for line in written[0].splitlines())
    run(evaluate, "r r --steps 1 3 --num-samples 20 --temperatures 0.5")
    report = json.loads(Path("r/quality.json").read_text())
    rows = {(row["model"], row["steps"], row["temperature"]): row for row in report["samples"]}
    assert len(rows) == len(report["samples"]) == 1 + 2 * (2 + 1 + 2)
    assert f"{rows['mdlm', 3, 0.5]['perplexity']:.4g}" in capsys.readouterr().out
    assert Path("r/quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(report["infilling"]) == 3 * (1 + 1 + 2)
    text = evaluate.load_run(Path("r"), "ngram", CPU)[1]
    hidden = evaluate.hide(text, text.rows, 0.5, 0) < 0
    assert not (hidden & (text.rows == text.end)).any()
    assert abs(hidden.sum() / (text.rows != text.end).sum() - 0.5) < 0.1
    text.end, text.heldout = 0, [(1, 2, 0)]  # bigrams 12 and 20, against 12, 22 and 20
    measured = text.measure(len, torch.tensor([[1, 2, 2, 0, 0]] * 2))
    assert (measured["length"], measured["distinct"], measured["training"]) == (4, 0.5, 0)
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
    (baselines, "--run-dir none --width 8", "unrecognized arguments"),
    (evaluate, "--steps 4 0", r"--steps \[4, 0\]: must be greater than 0")])
def test_mistakes_of_the_user(folder, program, line, message):
    with pytest.raises(UserError, match=message):
        run(program, line)
