"""Compares the models of a run: how well they write, in how many network evaluations, and how likely they find other text.

    python evaluate.py --run-dir runs/words                        # a table; quality.json and quality.png in the folder
    python evaluate.py --run-dir runs/sotu --judge ar --seeds 3
    python evaluate.py --run-dir runs/my --judge gpt2-large        # or a folder; pip install transformers

perplexity  of the samples under the judge, which reads a text up to and including its first end token: an n-gram model of
            the training text, the run's own ar, or any causal language model of Hugging Face
entropy     of the frequencies of the tokens in one sample, nats, their mean. Low perplexity with low entropy is collapse:
            never quote one without the other
distinct    share of different samples; training, held out: share found there whole
as flow     share of tokens that equal those of the (unguided) flow's text of the most steps, from the same noise
flm+noise   the flow with fresh noise in each step (flm.py --churn)

Of a large corpus 4 million tokens of each split are read. The run's own ar judges its own samples too well. fmlm has seen
its flow's tokens and those of its distillation.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
import data
import distill
import flm
import join
from run import Parser, guard, picture, program, say, setup
from sources import UserError, replace_file

# ----------------------------------------------------------------------------------------------------- 1. The judges
# A judge gives texts, lists of ids that stop behind the first end token, their perplexity: exp of the mean nats a token.


class NGram:
    """Interpolated Kneser-Ney (Chen and Goodman 1999) over token ids, one discount n1 / (n1 + 2 n2) an order.

    texts: sequences of ids, each read from its first token on. The longest n-grams and those at the start of a text are
    counted as they occur, shorter ones by the number of tokens that precede them; the mass left over is even over V.
    """

    def __init__(self, texts: Sequence[Sequence[int]], V: int, order: int):
        self.V, self.order, self.start = V, order, -1
        counts = [Counter() for _ in range(order + 1)]  # by length
        for text in texts:
            text = (self.start, *text)
            for i in range(1, len(text)):
                counts[min(i + 1, order)][text[max(0, i + 1 - order) : i + 1]] += 1
        for n in range(order, 1, -1):
            for gram in counts[n]:
                counts[n - 1][gram[1:]] += 1
        self.counts, self.discounts = counts, [0.0]
        self.contexts = defaultdict(lambda: [0, 0])  # context -> sum of the counts after it, how many tokens follow it
        for table in counts[1:]:
            once, twice = (sum(count == n for count in table.values()) for n in (1, 2))
            self.discounts.append(once / (once + 2 * twice) if once else 0.5)
            for gram, count in table.items():
                after = self.contexts[gram[:-1]]
                after[0] += count
                after[1] += 1

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | the ids before it, from the start of the text)."""
        history = (self.start, *context)
        p = 1 / self.V
        for n in range(1, min(self.order, len(history) + 1) + 1):
            gram = (*history[len(history) + 1 - n :], token)
            if gram[:-1] not in self.contexts:
                break
            total, kinds = self.contexts[gram[:-1]]
            discount = self.discounts[n]
            p = (max(self.counts[n][gram] - discount, 0) + discount * kinds * p) / total
        return p

    def __call__(self, texts: Sequence[Sequence[int]]) -> float:
        nats = [-math.log(self.probability(text[:i], text[i])) for text in texts for i in range(len(text))]
        return math.exp(sum(nats) / len(nats))


def ar_judge(model: flm.Transformer) -> Callable:
    """The perplexity that an autoregressive model of the same tokens gives to texts."""
    @torch.no_grad()
    def judge(texts: Sequence[Sequence[int]]) -> float:
        nats = 0.0
        for some in batches(texts, flm.rows_at_once(model)):
            rows = torch.tensor([[*text, *[0] * (model.config.seq_len - len(text))] for text in some])
            lengths = torch.tensor([len(text) for text in some])
            read = torch.arange(rows.shape[1]) < lengths[:, None]  # what comes later does not change what is read
            nats += baselines.ar_nats(model, rows.to(model.device)).cpu()[read].double().sum().item()
        return math.exp(nats / sum(map(len, texts)))
    return judge


def hugging_face(name: str, tokenizer: data.Tokenizer, device: torch.device) -> Callable:
    """The perplexity under a causal language model of Hugging Face, by name or folder, of the texts in its own tokens, an
    end in ours being one in theirs. The first token of a text has nothing before it and is not scored.

    Raises UserError where transformers or the model is missing.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"--judge {name}: needs transformers; pip install transformers, or use --judge ngram") from None
    try:
        codec = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # its hub client and its loaders raise many kinds
        raise UserError(f"--judge {name}: could not be loaded ({type(error).__name__}); give ngram, ar, or the name or "
                        "folder of a causal language model") from None
    if codec.eos_token_id is None:
        raise UserError(f"--judge {name}: its tokenizer has no end token, so it cannot tell where a text ends; give another")
    most = getattr(model.config, "max_position_embeddings", None) or 2**31

    @torch.no_grad()
    def judge(texts: Sequence[Sequence[int]]) -> float:
        from tqdm import tqdm

        nats, count = 0.0, 0
        for some in tqdm(list(batches(texts, 16)), desc=name, unit="batch", leave=False, file=sys.stderr):
            ids = [codec(tokenizer.decode(text)).input_ids + [codec.eos_token_id] * (text[-1] == tokenizer.end)
                   for text in some]
            ids = [row[:most] for row in ids]
            lengths = torch.tensor([len(row) for row in ids])
            rows = torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids], device=device)
            read = (torch.arange(rows.shape[1]) < lengths[:, None]).to(device)
            logits = model(rows, attention_mask=read.long()).logits.float()
            scores = F.cross_entropy(logits[:, :-1].mT, rows[:, 1:], reduction="none")[read[:, 1:]]
            nats, count = nats + scores.double().sum().item(), count + len(scores)
        if not count:
            raise UserError(f"--judge {name}: no text has two of its tokens, so there is nothing to score; give ngram")
        return math.exp(nats / count)
    return judge


def batches(rows: Sequence, size: int) -> list:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# --------------------------------------------------------------------------------------------------- 2. The measures


def until_end(text: Sequence[int], end: int, first: int = 0) -> Sequence[int]:
    """The tokens up to and including the first end token, from place `first` on."""
    return text[: text.index(end, first) + 1] if end in text[first:] else text


def unigram_entropy(texts: Sequence[Sequence[int]]) -> float:
    """Mean over the texts of the entropy, in nats, of the frequencies of the tokens in one text."""
    return sum(-sum(c / len(text) * math.log(c / len(text)) for c in Counter(text).values()) for text in texts) / len(texts)


def likeness(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], end: int, padded: bool) -> float:
    """Share of equal tokens in two lists of rows, of padded ones where either text is unfinished or ends."""
    pairs = []
    for x, y in zip(a, b):
        n = max(len(until_end(x, end)), len(until_end(y, end))) if padded else len(x)
        pairs += zip(x[:n], y[:n])
    return sum(x == y for x, y in pairs) / len(pairs)


def fingerprints(tokens: np.ndarray, L: int, stride: int) -> np.ndarray:
    """A 64-bit hash of the L tokens from each `stride`-th place of (N,) on: sums with random weights, modulo 2^64."""
    weights, last = np.random.default_rng(0).integers(2**64, size=L, dtype=np.uint64), len(tokens) - L + 1
    return sum(weight * (tokens[i : i + last : stride].astype(np.uint64) + np.uint64(1)) for i, weight in enumerate(weights))


def hide(rows: Tensor, share: float, end: int, padded: bool, frame: int, seed: int) -> Tensor:
    """Rows (n, L) with -1 at a random `share` of the tokens of each text, one at least of a text that has any; not at the
    end token of a padded row, nor at the `frame` tokens at either end of a packed one."""
    hidden = rows.clone()
    generator = torch.Generator().manual_seed(seed)
    for row in hidden:
        places = torch.arange(frame, len(until_end(row.tolist(), end)) - 1 if padded else len(row) - frame)
        count = max(1, round(share * len(places)))
        row[places[torch.randperm(len(places), generator=generator)[:count]]] = -1
    return hidden


def fillers(models: dict[str, flm.Transformer], steps: Sequence[int], texts: Sequence[Sequence[int]], end: int) -> dict:
    """What fills gaps: fill(hidden (n, L), seed) -> rows (n, L), by name. Chance draws from the frequencies of tokens."""
    counts = Counter(token for text in texts for token in text if token != end)
    tokens, weights = torch.tensor(list(counts)), torch.tensor(list(counts.values()), dtype=torch.float64)

    def chance(hidden: Tensor, seed: int) -> Tensor:
        drawn = torch.multinomial(weights, hidden.numel(), True, generator=torch.Generator().manual_seed(seed))
        return torch.where(hidden < 0, tokens[drawn].view(hidden.shape), hidden)
    samplers = {"flm": flm.sample, "fmlm": distill.sample, "mdlm": baselines.mdlm_sample}
    return {"chance": chance} | {
        f"{kind} {count}": lambda hidden, seed, kind=kind, count=count: samplers[kind](
            models[kind], len(hidden), count, seed, known=hidden)
        for kind in samplers if kind in models for count in steps}


# ------------------------------------------------------------------------------------------------- 3. The likelihood


@torch.no_grad()
def likelihood_bound(model: torch.nn.Module, tokens: Tensor, rows: flm.Rows, last: float = 0.999) -> Tensor:
    """The variational bound on -log p of each row of tokens (B, L), in nats (B,), estimated at one time a row.

    1/2 int_0^t1 SNR'(t) |x1 - D_t|^2 dt - log D_t1(x1), SNR = t^2/(1-t)^2, at t1 = t(tau = last), beyond which nothing was
    trained: the Gaussian bound of Kingma et al. 2021; the prior's term is 0. The integral runs over tau, drawn by `rows`.
    Distances are taken where the noise is white: in V dimensions, or for `linear` with V > D in D, behind chol(E^T E).
    """
    draw, white = rows.draw(tokens.shape[1], model.noise_dims, tokens.device)
    noise, clean, tau = model.noise(white), model.clean(tokens), last * draw
    t = model.clock.t(tau)[:, None, None]
    probs = model(torch.lerp(noise, clean, t), tau).softmax(-1)
    if model.noise_dims == model.V:
        error = torch.nn.functional.one_hot(tokens, model.V) - probs
    else:
        error = torch.linalg.solve_triangular(model.factor(), (clean - model.clean(probs)).mT, upper=False)
    rate = (t / (1 - t) ** 3).flatten() * last * model.clock.slope(tau)  # SNR'/2 dt/dtau
    end = torch.full_like(tau, last)
    left = model(torch.lerp(noise, clean, model.clock.t(end)[:, None, None]), end, targets=tokens).sum(1)
    return rate * error.square().sum((1, 2)) + left


@torch.no_grad()
def likelihood(model: flm.Transformer, heldout: Tensor, tokens: int, seed: int) -> dict:
    """-log p of the held-out rows (n, L), in nats for each of their `tokens` tokens (of padded rows up to the end): exact
    for ar, an upper bound for flm and mdlm, which also predict the padding. Their times are random: the mean of 8 passes,
    in each of which a row has one time, and its standard error."""
    def ar_nats(model: flm.Transformer, tokens: Tensor, rows: flm.Rows) -> Tensor:
        nats, end = baselines.ar_nats(model, tokens), (tokens == model.tokenizer.end).long()
        return (nats if model.config.packing else nats * (end.cumsum(1) - end == 0)).sum(1)
    nats = {"ar": ar_nats, "flm": likelihood_bound,
            "mdlm": lambda model, tokens, rows: baselines.mdlm_loss(model, tokens, rows)[0] * tokens.shape[1]}[model.kind]
    n, bound, batch, passes = len(heldout), model.kind != "ar", flm.rows_at_once(model), []
    for k in range(8 if bound else 1):
        turned = heldout.roll(k * n // 8, 0)  # each row at times from all over
        rows = flm.Rows(seed, -2, range(n), n).fresh(k)
        passes.append(sum(nats(model, turned[i : i + batch].to(model.device), replace(rows, index=range(n)[i : i + batch]))
                          .cpu().double().sum().item() for i in range(0, n, batch)) / tokens)
    nats = mean(passes)
    return dict(bound=bound, nats=nats, bits=nats / math.log(2), perplexity=math.exp(nats),
                standard_error=stdev(passes) / math.sqrt(8) if bound else 0.0)


# -------------------------------------------------------------------------------------------------- 4. Command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run-dir", default="runs/words", help="folder of a finished run")
    parser.add_argument("--judge", default="ngram", help="ngram, ar, or a causal language model of Hugging Face")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="network evaluations for a text")
    parser.add_argument("--churn", type=float, default=1.0, help="fresh noise in the steps of flm+noise; 0: leave it out")
    parser.add_argument("--guidance", type=float, nargs="*", default=[], help="also the flow with these, in the most steps; "
                        "guidance.png")
    parser.add_argument("--hide", type=float, nargs="*", help="shares of held-out texts to hide and fill (default, of a run "
                        "with --condition-prob: 0.25 0.5 0.75)")
    parser.add_argument("--num-samples", type=int, default=1000, help="texts judged for each number of steps")
    parser.add_argument("--seeds", type=int, default=1, help="sets of texts, for mean and standard deviation")
    parser.add_argument("--seed", type=int, default=0, help="the first of their seeds")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    args = parser.parse_args(argv)
    for name in ("num_samples", "seeds", "steps"):
        if np.min(value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not all(0 < share <= 1 for share in args.hide or []):
        raise UserError(f"--hide {args.hide}: must be above 0, and 1 or less")
    if not (0 <= args.seed <= 2**62 and args.threads <= 2**10):
        raise UserError(f"--seed {args.seed} --threads {args.threads}: must be from 0 on, 2^62 and 1024 at most")
    for name in ("churn", "threads", "guidance"):
        if not (np.min(value := getattr(args, name), initial=0) >= 0 and np.isfinite(value).all()):
            raise UserError(f"--{name} {value}: must be 0 or more")
    args.guidance = sorted(set(args.guidance) - {0.0})
    return args


COLUMNS = dict(perplexity="12.2f", entropy="10.3f", distinct="10.3f", training="10.3f", heldout="10.3f", as_flow="10.3f",
               seconds="10.2f", tokens_per_s="12.0f")


def line(name: str, result: dict) -> str:
    """A row of the table, with the standard deviations behind it."""
    cells = (" " * int(form.split(".")[0]) if result.get(column) is None else f"{result[column]:{form}}"
             for column, form in COLUMNS.items())
    spread = (f" +- {result[column]:.2g} {column[:-4]}" for column in ("perplexity_std", "entropy_std") if column in result)
    return f"{name:12}" + "".join(cells) + ",".join(spread)


def plot(report: dict, path: Path) -> None:
    """Perplexity against network evaluations, one line a model, entropies beside the points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(dict.fromkeys(r["model"] for r in report["samples"] if "=" not in r["model"])):
        points = [result for result in report["samples"] if result["model"] == kind]
        x, y = ([result[name] for result in points] for name in ("steps", "perplexity"))
        color = f"C{place}"
        axes.errorbar(x, y, [result.get("perplexity_std", 0) for result in points], marker="o", label=kind, color=color)
        for result, *at in zip(points, x, y):
            axes.annotate(f"{result['entropy']:.2f}", at, xytext=(6, 12 - 8 * place), textcoords="offset points",
                          fontsize=8, color=color)
    text = report["heldout_text"]
    axes.axhline(text["perplexity"], color="gray", linestyle="--", label=f"held-out text ({text['entropy']:.2f})")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=f"perplexity ({report['judge']})",
             title=f"{report['run']}: perplexity, and entropy beside the points")
    axes.set_xticks(sorted({result["steps"] for result in report["samples"]}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_guidance(report: dict, weights: Sequence[float], path: Path) -> None:
    """Perplexity against entropy of the flow under guidance, and of the other models in as many steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    most = max(result["steps"] for result in report["samples"] if result["model"] == "flm")
    found = {result["model"]: result for result in report["samples"] if result["steps"] == most}
    curve = [(0.0, found["flm"]), *((w, found[f"flm w={w:g}"]) for w in weights)]
    axes.plot([r["entropy"] for _, r in curve], [r["perplexity"] for _, r in curve], marker="o", label="flm, guided")
    for w, result in curve:
        at = result["entropy"], result["perplexity"]
        axes.annotate(f"{w:g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    others = {name: found[name] for name in ("fmlm", "mdlm") if name in found} | {"held out": report["heldout_text"]}
    for name, result in others.items():
        axes.plot(result["entropy"], result["perplexity"], "s", label=name)
    axes.set(xlabel="entropy, nats", ylabel=f"perplexity ({report['judge']})", title=f"{report['run']}, {most} evaluations")
    axes.legend()
    figure.savefig(path, dpi=150)


MOST = 2**22  # tokens of a split that are read: of a large corpus, the first training and held-out rows


def find(folder: Path, judge: str, device: torch.device) -> tuple[dict[str, flm.Transformer], data.Corpus]:
    """The models of a run by kind, and its corpus. Raises UserError where the flow, the judge or the text is missing."""
    models = {kind: flm.load(folder / f"{kind}.pt", device) for kind in ("flm", "fmlm", "mdlm", "ar")
              if kind in ("flm", judge) or (folder / f"{kind}.pt").exists()}
    text = join.text_of(folder)
    corpus = flm.corpus_of(replace(models["flm"].config, **text))
    for kind, model in models.items():
        join.check_text(model, corpus, text["data_dir"] or text["dataset"])
        if model.config.seq_len != corpus.seq_len or model.config.packing != corpus.packing:
            raise UserError(f"{folder / kind}.pt: has other rows than the flow; train it anew: {program(kind)} "
                            f"--run-dir {folder} --overwrite")
        if model.step < model.config.max_steps:
            say(f"{folder / kind}.pt: is not finished, it has {model.step} of its {model.config.max_steps} steps")
        model.config.bf16 = models["flm"].config.bf16  # one number format for all
    if corpus.borrowed:
        say(f"{text['dataset']}: is too short to hold anything out, so held-out text is training text")
    return models, corpus


def context_free_loss(model: flm.Transformer, corpus: data.Corpus, rows: int) -> float:
    """The flow loss of Bayes' rule alone: a posterior network without blocks whose output is zero."""
    config = replace(model.config, parameterization="posterior", depth=0, condition_prob=0.0)
    bayes = flm.Transformer(config, model.V, corpus.log_p)
    torch.nn.init.zeros_(bayes.head.weight)
    return mean(flm.held_out_loss(bayes.to(model.device), flm.flow_loss, corpus, rows))


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder, n, device = Path(args.run_dir), args.num_samples, setup(args.device, args.threads)
    models, corpus = find(folder, args.judge, device)
    flow, padded, end, frame = models["flm"], not corpus.packing, corpus.tokenizer.end, corpus.frame
    inner = corpus.seq_len - 2 * frame
    train, heldout = (corpus.batch(split, 0, range(min(corpus.blocks(split), MOST // corpus.seq_len)))
                      for split in ("train", "heldout"))
    texts = [[until_end(row, end) if padded else row for row in split.tolist()] for split in (train, heldout)]
    if args.judge == "ngram":
        order = 5 if corpus.tokenizer.kind == "chars" else 3
        judge, name = NGram(texts[0], flow.V, order), f"{order}-gram judge"
    elif args.judge == "ar":
        judge, name = ar_judge(models["ar"]), "the run's ar judges"
    else:
        judge, name = hugging_face(args.judge, corpus.tokenizer, device), f"{args.judge} judges"

    splits = {name: fingerprints(corpus.splits[split][:MOST], inner, inner if padded else 1)
              for name, split in (("training", "train"), ("heldout", "heldout"))}

    def measure(rows: Tensor, reference: Tensor | None = None) -> dict:
        rows = rows.masked_fill((rows == end).cumsum(1) > 0, end) if padded else rows  # behind the end there is no text
        texts = [until_end(row, end) if padded else row for row in rows.tolist()]
        prints = fingerprints(rows[:, frame : frame + inner].numpy().ravel(), inner, inner)
        result = dict(perplexity=judge([until_end(text, end, frame) for text in texts]), entropy=unigram_entropy(texts),
                      distinct=len(set(map(tuple, texts))) / len(texts))
        result |= {name: float(np.isin(prints, there).mean()) for name, there in splits.items()}
        if reference is not None:
            result["as_flow"] = likeness(rows.tolist(), reference.tolist(), end, padded)
        return result
    counts, tokens = Counter(chain(*texts[0])), list(chain(*texts[1]))
    report = dict(run=folder.resolve().name, judge=name, num_samples=n, seeds=list(range(args.seed, args.seed + args.seeds)),
                  batch_size=min(n, flm.rows_at_once(flow)), device=str(device), threads=torch.get_num_threads(),
                  loss=mean(flm.held_out_loss(flow, flm.flow_loss, corpus, len(heldout))),
                  context_free_loss=context_free_loss(flow, corpus, len(heldout)),
                  unigram_nats=mean(math.log((counts.total() + flow.V) / (counts[token] + 1)) for token in tokens),
                  likelihood={kind: likelihood(model, heldout, len(tokens), args.seed) for kind, model in models.items()
                              if kind != "fmlm"},
                  heldout_text=measure(heldout[:n]), samples=[])
    print(f"held-out loss of the flow {report['loss']:.4f} nats a position, Bayes' rule without context "
          f"{report['context_free_loss']:.4f}: {report['loss'] / report['context_free_loss']:.3f}\n\n"
          f"{'held-out likelihood':24}{'nats a token':>18}{'bits':>10}{'perplexity':>12}")
    for kind, result in report["likelihood"].items():
        print(f"{kind + (', at most' if result['bound'] else ', exact'):24}{result['nats']:10.3f} +- "
              f"{result['standard_error']:.3f}{result['bits']:10.3f}{result['perplexity']:12.2f}")
    unigram = report["unigram_nats"]
    print(f"{'unigram frequencies':24}{unigram:10.3f}{'':8}{unigram / math.log(2):10.3f}{math.exp(unigram):12.2f}\n")
    print(f"{n} samples x {args.seeds}, {report['batch_size']} at once on {device}, {report['threads']} threads; {name}\n"
          f"{'':12}{'perplexity':>12}{'entropy':>10}{'distinct':>10}{'training':>10}{'held out':>10}{'as flow':>10}"
          f"{'seconds':>10}{'tokens/s':>12}\n{line('held out', report['heldout_text'])}", flush=True)
    samplers = {"flm": flm.sample, "fmlm": distill.sample, **baselines.SAMPLERS}
    several = sorted(set(args.steps), reverse=True)
    series = [(kind, kind, sample, [corpus.seq_len] if kind == "ar" else several)
              for kind, sample in samplers.items() if kind in models]
    if args.churn:
        series.insert(1, ("flm+noise", "flm", partial(flm.sample, churn=args.churn), several))
    series += [(f"flm w={w:g}", "flm", partial(flm.sample, guidance=w), several[:1]) for w in args.guidance]
    flows = {}
    for label, kind, sample, evaluations in series:
        for steps in evaluations:
            runs = []
            for seed in report["seeds"]:
                begin = time.perf_counter()
                rows = sample(models[kind], n, steps, seed)
                seconds = time.perf_counter() - begin
                flows.setdefault(seed, rows)  # those of the flow in the most steps come first
                runs.append(measure(rows, flows[seed] if label in ("flm", "fmlm") else None)
                            | dict(seconds=seconds, tokens_per_s=rows.numel() / seconds))
            result = {name: mean(run[name] for run in runs) for name in runs[0]}
            if len(runs) > 1:
                result |= {f"{name}_std": stdev(run[name] for run in runs) for name in ("perplexity", "entropy")}
            report["samples"].append(dict(model=label, steps=steps, trained_steps=models[kind].step) | result)
            print(line(f"{label} {steps}", result), flush=True)
    shares = [0.25, 0.5, 0.75] if args.hide is None and flow.mark is not None else args.hide or []
    if shares:
        def nats(rows: Tensor) -> float:
            return math.log(judge([until_end(row, end, frame) for row in rows.tolist()]))
        whole, report["infilling"] = heldout[:n], []
        print(f"\n{len(whole)} held-out texts, {nats(whole):.3f} nats a token to the judge, with a share hidden and filled: "
              f"tokens right, texts right, nats a token\n{'':12}" + "".join(f"{share:>28.0%}" for share in shares))
        for label, fill in fillers(models, sorted({min(args.steps), max(args.steps)}), texts[0], end).items():
            cells = []
            for share in shares:
                hidden = hide(whole, share, end, padded, frame, args.seed)
                rows = fill(hidden, args.seed)
                right = rows == whole
                result = dict(model=label, hidden=share, tokens=right[hidden < 0].float().mean().item(),
                              texts=right.all(1).float().mean().item(), nats=nats(rows))
                report["infilling"].append(result)
                cells.append(f"{result['tokens']:12.3f}{result['texts']:8.3f}{result['nats']:8.3f}")
            print(f"{label:12}" + "".join(cells), flush=True)
    try:
        replace_file(folder / "quality.json", json.dumps(report, indent=1))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); make room there") from None
    picture(folder / "quality.png", lambda path: plot(report, path))
    if args.guidance:
        picture(folder / "guidance.png", lambda path: plot_guidance(report, args.guidance, path))


if __name__ == "__main__":
    sys.exit(guard(main))
