"""Baselines and evaluation: each number is compared with an analytic or independent value."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tokenizers
import torch

import distill
import flm
from data import UserError
from extras import baselines, evaluate
from test_flm import CPU, PHRASES, TEXT, TINY, TOKENS, Source, network, run

@pytest.mark.parametrize("packing", [True, False])
def test_the_cache_of_ar_changes_nothing(packing, monkeypatch):
    """To float32 rounding."""
    model = network(7, baselines.AR, seq_len=12, packing=packing, state_norm=not packing)
    draw = Mock(wraps=baselines.draw)
    monkeypatch.setattr(baselines, "draw", draw)
    tokens = baselines.ar_sample(model, 3, 0, seed=1)
    logits = torch.stack([call.args[0] for call in draw.call_args_list], dim=1)
    cached = flm.cross_entropy(logits, tokens)
    assert torch.allclose(cached, baselines.ar_nats(model, tokens), atol=2e-5)

def test_ar_samples_have_the_probabilities_of_the_full_network():
    """Each of the 27 texts, within 4.5 binomial standard errors."""
    model, n = network(3, baselines.AR, seq_len=3, packing=False), 20_000
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = baselines.ar_nats(model, every).sum(1).neg().exp()
    texts = baselines.ar_sample(model, n, 0, seed=5)
    counts = (texts[:, None] == every).all(2).sum(0)
    assert ((counts - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt()).all()
    with pytest.raises(UserError, match="fills no gaps"):
        baselines.ar_sample(model, 1, 0, seed=6, known=torch.tensor([2, -1, 1]))

def test_the_bound_of_an_untrained_mdlm_is_log_v():
    """Of L n tokens with weights 1/m, m = 1 - tau > 1/n: error log V ((ln n - 1)/(L n))^.5."""
    V, L, n = 9, 16, 4000
    model = network(V, baselines.Baseline, seq_len=L)
    for p in model.head.parameters():
        torch.nn.init.zeros_(p)
    nats, _ = baselines.mdlm_loss(model, torch.randint(V, (n, L)))
    error = math.log(V) * math.sqrt((math.log(n) - 1) / (L * n))
    assert abs(nats.mean() - math.log(V)) < 3 * error < 0.1

def test_mdlm_mixes_phrases_if_it_unmasks_both_tokens_in_one_step():
    """Probability 1/K in K steps, and half of these are mixed: within 4 standard errors."""
    model, n = Source(*PHRASES), 20_000  # clean tokens decide; the evidence of blank ones is 0
    model.blank = torch.zeros(4)
    for steps in (1, 2, 4, 16):
        first, second = baselines.mdlm_sample(model, n, steps, seed=2).T
        p = 1 / (2 * steps)
        assert abs((second != first + 1).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert abs((first == 0).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)

@pytest.mark.parametrize("E", [torch.eye(5), torch.randn(5, 3, generator=torch.Generator())])
def test_the_bound_of_the_exact_denoiser_is_the_entropy_of_the_source(E):
    """By the identity of information and mean squared error (Guo et al. 2005)."""
    p, n = TOKENS[1], 100_000
    tokens = p.multinomial(n, replacement=True)[:, None]
    nats, _ = evaluate.likelihood_bound(Source(*TOKENS, E), tokens)
    error = nats.std() / math.sqrt(n)
    assert abs(nats.mean() + (p * p.log()).sum()) < 3 * error < 0.1

def test_the_exact_flow_copies_all_tokens():
    text = SimpleNamespace(rows=torch.randint(1, 5, (50, 1)), end=4)
    assert evaluate.copied(Source(*TOKENS), text) == 1

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

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The run folder r of a flow, a map and baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        Path("a.txt").write_text(TEXT)
        run(flm, f"{TINY} --width 12 --condition-prob 0.3 --max-steps 6 --run-dir r")
        run(distill, "--run-dir r --max-steps 2")
        for kind in ("ar", "mdlm"):
            run(baselines, f"--run-dir r --model {kind}")
        yield

def test_baselines_continue_a_prompt(run_folder, capsys):
    for kind in ("ar", "mdlm"):
        run(baselines, f"--run-dir r --sample --model {kind} --prompt ab --num-samples 4")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(line.startswith("ab") for line in lines)

def test_evaluation_has_a_row_per_model_steps_and_temperature(run_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "FOR_REVERSE", 50)
    run(evaluate, "r r --num-samples 20 --reverse")
    tables = list(json.loads(Path("r/quality.json").read_text())["tables"].values())
    nats, samples, equal, as_good = tables
    assert len(samples) == 1 + 5 * (2 + 6 + 1) + 3 and len(equal) == 1 + 2 + 6 + 1 + 3
    assert [row["model"] for row in nats] == ["flm", "ar", "mdlm"]
    assert samples[0]["perplexity_sd"] == 0 < samples[1]["perplexity_sd"]  # other random numbers
    assert sum(row["reverse"] is not None for row in samples) == 1 + 1 + 5 + 1 + 3
    assert len(as_good) == 5 and as_good[0].keys() == {
        "model", "steps", "perplexity", "variation", "reverse"}

def test_measures_of_samples(run_folder):
    text = evaluate.load_run(Path("r"), CPU)[1]
    text.end, text.tokenizer.kind, text.heldout = 0, "ids", [(1, 2, 0)]  # bigram 12: 20 has an end
    rows = torch.tensor([[1, 2, 2, 0, 0]] * 2)
    measured = text.measure(len, rows, count=4)  # bigrams 12 and 22
    assert (measured["length"], measured["distinct"], measured["training"]) == (4, 0.5, 0)
    assert abs(measured["variation"] - 1 / 2) < 1e-9 > abs(measured["diversity"] - math.log(2))
    assert abs(measured["entropy"] - math.log(4) * 3 / 4) < 1e-9  # frequencies 1/4, 1/2, 1/4
    assert abs(text.measure(len, rows, count=3)["diversity"] - math.log(3) + math.log(4) / 3) < 1e-9
    text.heldout = text.train[:5]
    assert text.reverse(text.train) < text.reverse([(1, 1, 0)] * 9)
    assert text.items([(1, 0, 2, 0), (3,)]) == [("1", "</s>", "2", "</s>"), ("3",)]

def test_curves_are_interpolated_and_never_extrapolated():
    """Perplexity 100 at diversity 7 and 25 at 6: 50 half-way. Variation falls from .8 to .2."""
    curve = [dict(diversity=7.0, perplexity=100.0), dict(diversity=6.0, perplexity=25.0)]
    assert abs(evaluate.at_diversity(curve, 6.5, "perplexity") - 50) < 1e-9
    assert evaluate.at_diversity(curve, 7.01, "perplexity") is None
    for value, steps in ((0.9, "< 1"), (0.8, "2"), (0.4, "4"), (0.1, "> 8"), (0, "")):
        assert evaluate.steps_of({1: 0.8, 2: 0.8, 8: 0.2, 16: None}, value) == steps

def test_a_judge_of_transformers_gives_the_perplexity_of_its_loss(run_folder, capsys):
    """Two layers with random weights, on texts of 2 to 39 tokens, of which it reads 16."""
    transformers = pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel(dict(zip("?ab ", range(4))), "?")
    codec = tokenizers.Tokenizer(words)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=codec, eos_token="?")
    fast.save_pretrained("judge")
    config = transformers.GPT2Config(vocab_size=4, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("judge")
    text = evaluate.load_run(Path("r"), CPU)[1]
    lines = [("ab a bb" * 6)[: 2 + i] for i in range(38)]
    nats = []
    for line in lines:
        ids = torch.tensor([codec.encode(line).ids[:16]])
        nats += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    judge = evaluate.model_judge("judge", text, CPU)
    found = judge(text.tokenizer.encode(lines))
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert "23 of 38 texts are cut to 16 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="--judge nothing: cannot be read.*pip install"):
        evaluate.model_judge("nothing", text, CPU)
