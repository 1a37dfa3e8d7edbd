"""Compares the models of a run: quality of their texts, network evaluations, likelihood.

    python -m extras.evaluate runs/sentences                 # writes quality.json and quality.png
    python -m extras.evaluate runs/a runs/b runs/c           # mean and standard deviation
    python -m extras.evaluate --temperatures 1.15 1 .9 .8

perplexity  of the samples: per word under 4-grams of the training text (per character under
            5-grams for a character tokenizer), or per token under the ar of the run (--judge ar). A
            text is read up to its first end token.
entropy     of the token frequencies within a sample in nats, mean over samples. It does not show
            whether all samples are alike: see bigrams, variation and distinct.
length      tokens per sample, including its end token
bigrams     entropy of the pooled bigrams of all samples in nats
variation   total variation distance between the bigrams of samples and of held-out texts
distinct    share of different samples
training    share of samples that occur in the training text
"""

import argparse
import copy
import json
import math
import os
import sys
from collections import Counter
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import data
import distill
import flm
from data import UserError
from extras import baselines

MOST = 2**22  # tokens to read from a split

# A judge is a function from texts (lists of ids) to their perplexity: exp of the mean nats.

class NGram:
    """Interpolated Kneser-Ney (Chen and Goodman 1999), one discount n1 / (n1 + 2 n2) per order.

    texts: sequences of items (words, tokens), of which there are V. The longest n-grams and those
    at the start of a text are counted as they occur, shorter ones by the number of different items
    before them.
    """

    def __init__(self, texts, V, order):
        self.V, self.order = V, order
        self.counts = [Counter() for _ in range(order + 1)]  # by length
        for text in texts:
            text = (None, *text)
            for i in range(1, len(text)):
                gram = text[max(0, i + 1 - order) : i + 1]
                self.counts[len(gram)][gram] += 1
        for n in range(order, 1, -1):
            self.counts[n - 1].update(gram[1:] for gram in self.counts[n])

        self.discounts = [0.0]
        self.total, self.kinds = Counter(), Counter()  # occurrences, different items
        for table in self.counts[1:]:
            times = Counter(table.values())
            discount = times[1] / (times[1] + 2 * times[2]) if times[1] else 0.5
            self.discounts.append(discount)
            for gram, count in table.items():
                self.total[gram[:-1]] += count
                self.kinds[gram[:-1]] += 1

    def probability(self, context, token):
        """p(token | the tokens before it, from the start of the text)."""
        history = (None, *context)
        p = 1 / self.V
        for n in range(1, min(self.order, len(history) + 1) + 1):
            before = history[len(history) + 1 - n :]
            if before not in self.total:
                break
            discount, count = self.discounts[n], self.counts[n][*before, token]
            left = discount * self.kinds[before] * p
            p = (max(count - discount, 0) + left) / self.total[before]
        return p

    def perplexity(self, texts):
        nats = []
        for text in texts:
            for i, token in enumerate(text):
                context = text[max(0, i - self.order) : i]
                nats.append(-math.log(self.probability(context, token)))
        return math.exp(mean(nats))

def ngram_judge(text):
    """A judge: 4-grams of words, or 5-grams of characters for a character tokenizer."""
    train, order = text.items(text.train), 5 if text.tokenizer.kind == "chars" else 4
    V = 1 + len(set(chain.from_iterable(train)))  # 1 for unknown items
    ngram = NGram(train, V, order)
    return lambda texts: ngram.perplexity(text.items(texts))

def ar_judge(model):
    """A judge: the ar of the run. Its perplexity of its own samples is too low to compare."""
    @torch.no_grad()
    def judge(texts):
        rows = [torch.tensor(text) for text in texts]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        nats = []
        for part in rows.split(flm.forward_rows(model)):
            tokens = part.clamp(min=0).to(model.embedding.device)
            nats.append(baselines.ar_nats(model, tokens).cpu())
        return math.exp(torch.cat(nats)[rows >= 0].mean())
    return judge

def until_end(ids, end, start=0):
    """The ids up to the first end token, included, at or after `start`."""
    return ids[: ids.index(end, start) + 1] if end in ids[start:] else ids

def frequencies(items):
    """Relative frequencies by item."""
    counts = Counter(items)
    total = counts.total()
    return {item: count / total for item, count in counts.items()}

def entropy(p):
    """Entropy of relative frequencies in nats."""
    return -sum(x * math.log(x) for x in p.values())

def total_variation(p, q):
    """Half the sum of the absolute differences of relative frequencies."""
    items = p.keys() | q.keys()
    differences = [abs(p.get(item, 0) - q.get(item, 0)) for item in items]
    return sum(differences) / 2

def bigrams(texts):
    return frequencies(pair for text in texts for pair in pairwise(text))

class Text:
    """The text of a corpus, and measures of samples relative to it.

    train, heldout: texts, tuples of ids. rows: the held-out rows (n, L), in random order.
    """

    def __init__(self, corpus):
        self.corpus, self.tokenizer = corpus, corpus.tokenizer
        self.end, self.padded = corpus.tokenizer.end, not corpus.packing
        self.rows = self.read("heldout")
        self.heldout = self.texts(self.rows)
        self.train = self.texts(self.read("train"))

    def read(self, split):
        rows = min(self.corpus.rows(split), MOST // self.corpus.seq_len)
        return self.corpus.batch(split, range(rows))

    def texts(self, rows):
        """Rows (n, L) as tuples of ids; a padded row ends with its first end token."""
        texts = map(tuple, rows.tolist())
        return [until_end(ids, self.end) if self.padded else ids for ids in texts]

    def items(self, texts):
        """The items of the n-grams: the characters or the words of texts, and their end token."""
        if self.tokenizer.kind == "chars":
            return texts
        words = [tuple(self.tokenizer.decode(ids).split()) for ids in texts]
        ended = [ids[-1] == self.end for ids in texts]
        return [(*w, "</s>") if end else w for w, end in zip(words, ended)]

    def perplexity(self, judge, rows):
        """Perplexity under the judge of rows (n, L) up to their first end token."""
        start = self.corpus.frame
        return judge([until_end(ids, self.end, start) for ids in rows.tolist()])

    def measure(self, judge, rows):
        """The measures of samples (n, L) by name."""
        texts, n = self.texts(rows), len(rows)
        others = self.heldout[n:] or self.heldout  # not the ones that are measured
        train = set(self.train)
        return dict(
            perplexity=self.perplexity(judge, rows),
            entropy=mean(entropy(frequencies(text)) for text in texts),
            length=mean(map(len, texts)),
            bigrams=entropy(bigrams(texts)),
            variation=total_variation(bigrams(texts), bigrams(others)),
            distinct=len(set(texts)) / n,
            training=mean(text in train for text in texts))

def likelihood_bound(model, tokens, last=0.999):
    """Estimates a bound on -log p: tokens (B, L) -> nats per position (B,), random times tau (B,).

    -log p <= 1/2 int_0^t1 SNR'(t) E|x1 - D_t|^2 dt - E log D_t1(x1) with SNR = t^2 / (1-t)^2
    (Kingma et al. 2021) and t1 = t(tau = last). The integral is computed over tau.
    Distances are measured where the noise is white: in R^V, or in R^D after chol(E^T E)^-1.
    """
    noise, clean = model.noise(len(tokens)), model.clean(tokens)

    def logits(tau):
        t = model.clock.t(tau)[:, None, None]
        return model(torch.lerp(noise, clean, t), tau)

    tau = last * flm.uniform_times(len(tokens), tokens.device)
    probs = logits(tau).softmax(-1)
    if model.V <= model.config.width:
        error = F.one_hot(tokens, model.V) - probs
    else:
        error = (clean - model.clean(probs)).mT
        error = torch.linalg.solve_triangular(model.factor(), error, upper=False)
    error = error.square().sum((1, 2)) / tokens.shape[1]

    # 1/2 dSNR/dtau, with dt/dtau by a central difference in float64
    clock = copy.deepcopy(model.clock).cpu().double()
    x, h = tau.cpu().double(), 1e-7
    slope = (clock.t(x + h) - clock.t(x - h)) / (2 * h)
    t = clock.t(x)
    rate = last * slope * t / (1 - t) ** 3
    end = logits(torch.full_like(tau, last))
    return rate.to(error) * error + flm.cross_entropy(end, tokens).mean(1), tau

LOSSES = dict(flm=likelihood_bound, **baselines.LOSSES)

@torch.no_grad()
def likelihood(model, kind, text, n):
    """-log p of n held-out rows with their padding, in nats, per token without the padding.

    Exact for ar, an upper bound for flm and mdlm. Each row is evaluated at ten random times.
    """
    rows, nats = text.rows[:n], []
    torch.manual_seed(0)
    for _ in range(10):
        for part in rows.split(flm.forward_rows(model)):
            part_nats, _ = LOSSES[kind](model, part.to(model.embedding.device))
            nats.append(part_nats.cpu())
    tokens = mean(map(len, text.texts(rows)))
    return torch.cat(nats).mean().item() * text.corpus.seq_len / tokens

def hide(text, rows, share, seed):
    """Rows (n, L) with -1 at a random share of their tokens.

    The end token of a padded row and the frame of a packed row are never hidden.
    """
    n, L = rows.shape
    place, frame = torch.arange(L), text.corpus.frame
    inside = (place >= frame) & (place < L - frame)
    if text.padded:
        lengths = torch.tensor(list(map(len, text.texts(rows))))
        inside = place < lengths[:, None] - 1
    random = torch.rand(n, L, generator=torch.Generator().manual_seed(seed))
    return rows.masked_fill(inside & (random < share), -1)

def infilling(models, text, judge, args):
    """A row per model and hidden share, of num_samples / 4 texts: share restored, perplexity."""
    pool = torch.tensor([i for ids in text.train for i in ids if i != text.end])

    def chance(n, steps, seed, known):
        generator = torch.Generator().manual_seed(seed)
        drawn = pool[torch.randint(len(pool), known.shape, generator=generator)]
        return torch.where(known < 0, drawn, known)

    samplers = {("chance", 0): chance}
    for name, pick in (("flm", max), ("fmlm", min), ("mdlm", min), ("mdlm", max)):
        if name in models:
            samplers[name, pick(args.steps)] = partial(SAMPLERS[name], models[name])
    rows, table = text.rows[: (args.num_samples + 3) // 4], []
    for (name, steps), sampler in samplers.items():
        for share in (0.25, 0.5, 0.75):
            hidden = hide(text, rows, share, args.seed)
            filled = sampler(len(rows), steps, args.seed, known=hidden)
            restored = (filled == rows)[hidden < 0]
            table.append(dict(
                model=name, steps=steps, hidden=share,
                restored=restored.float().mean().item(),
                perplexity=text.perplexity(judge, filled)))
    return table

SAMPLERS = dict(flm=flm.sample, fmlm=distill.sample, **baselines.SAMPLERS)

def parse(argv):
    parser = flm.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", default=["runs/sentences"], help="folders of finished runs")
    add("--judge", default="words", choices=("words", "ar"), help="perplexity under n-grams or ar")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 64], help="evaluations per text")
    add("--temperatures", type=float, nargs="+", default=[1.0], help="of the samplers")
    add("--num-samples", type=int, default=1000, help="texts per row of the table")
    add("--seed", type=int, default=0, help="seed of the samples")
    add("--out", default="", help="folder of quality.json and quality.png; default: the first run")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    for name in ("steps", "temperatures", "num_samples"):
        if np.min(value := getattr(args, name)) <= 0:
            raise UserError(f"{flm.flag(name)} {value}: must be greater than 0")
    return args

def load_run(folder, judge, device):
    """The models of a run by kind, and its text. Raises UserError if they do not fit."""
    models, sources = {}, {}
    for kind in ("flm", "fmlm", "mdlm", "ar"):
        path = folder / f"{kind}.pt"
        if path.exists() or kind in ("flm", judge):
            models[kind] = baselines.load(path, device)
            sources[kind] = flm.load_checkpoint(path)["source"]
    config = models["flm"].config
    corpus = data.prepare(config.dataset, config.tokenizer, config.seq_len, config.packing,
                          config.vocab_size, config.data_dir)
    for kind, model in models.items():
        same_text = sources[kind] in ("", corpus.meta["source"])
        shape = model.config.seq_len, model.config.packing
        if not same_text or shape != (corpus.seq_len, corpus.packing):
            raise UserError(f"{folder}/{kind}.pt: its text, --seq-len or --packing differs from "
                            "that of the flow now; train it again with --overwrite")
    return models, Text(corpus)

def sample_all(models, text, judge, args):
    """Samples and measures each model with each number of steps and each temperature."""
    from tqdm import tqdm

    heldout = dict(model="held-out text", steps=None, temperature=None)
    table = [heldout | text.measure(judge, text.rows[: args.num_samples])]
    cells = []
    for name in SAMPLERS:
        steps = [text.corpus.seq_len] if name == "ar" else args.steps
        if name in models:
            cells += product([name], steps, sorted({1.0, *args.temperatures}))
    for name, steps, temperature in tqdm(cells, unit="cell", file=sys.stderr):
        sample = SAMPLERS[name]
        rows = sample(models[name], args.num_samples, steps, args.seed, temperature)
        cell = dict(model=name, steps=steps, temperature=temperature)
        table.append(cell | text.measure(judge, rows))
    return table

def over_runs(tables):
    """Merges the tables of several runs: mean, and standard deviation as name_sd."""
    merged = []
    for rows in zip(*tables):
        row = {}
        for name in rows[0]:
            values = [r.get(name) for r in rows]
            if not all(isinstance(x, float) for x in values) or name in ("temperature", "hidden"):
                row[name] = values[0]
                continue
            row[name] = mean(values)
            if len(values) > 1:
                row[f"{name}_sd"] = stdev(values)
        merged.append(row)
    return merged

def print_table(title, rows):
    """Prints rows, which are dicts. The cell of a missing value is empty."""
    names = [x for x in dict.fromkeys(chain.from_iterable(rows)) if not x.endswith("_sd")]
    table = [names]
    for row in rows:
        values = [row.get(name) for name in names]
        cells = [f"{x:.4g}" if isinstance(x, float) else str(x or "") for x in values]
        for i, name in enumerate(names):
            if f"{name}_sd" in row:
                cells[i] += f" ± {row[f'{name}_sd']:.2g}"
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))

STYLES = dict(flm="o-", fmlm="^-", mdlm="D:", ar="v-.")

def plot(rows, path):
    """Perplexity against network evaluations (temperature 1), and against entropy."""
    os.environ.pop("MPLBACKEND", None)  # Jupyter's backend does not exist in other programs
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    heldout, *rows = rows
    for name, style in STYLES.items():
        mine = [row for row in rows if row["model"] == name]
        if not mine:
            continue
        plain = [row for row in mine if row["temperature"] == 1]
        most = [row for row in mine if row["steps"] == mine[-1]["steps"]]
        for axes, x, points in ((left, "steps", plain), (right, "entropy", most)):
            errors = [row.get("perplexity_sd", 0) for row in points]
            axes.errorbar([row[x] for row in points], [row["perplexity"] for row in points],
                          errors, fmt=style, label=name, capsize=2)
    left.axhline(heldout["perplexity"], color="black", lw=0.8)
    right.plot(heldout["entropy"], heldout["perplexity"], "k*", ms=12, label="held-out text")
    left.set(xscale="log", yscale="log", xlabel="network evaluations per text",
             ylabel="perplexity of the samples", title="temperature 1; line: held-out text")
    right.set(xlabel="entropy of a sample (nats)",
              title="by temperature, at the most steps")
    right.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    part.replace(path)

def evaluate_run(folder, args, device):
    """The tables of one run: likelihood, samples, infilling."""
    models, text = load_run(folder, args.judge, device)
    judge = ar_judge(models["ar"]) if args.judge == "ar" else ngram_judge(text)
    nats = [dict(model=kind, nats=likelihood(models[kind], kind, text, args.num_samples))
            for kind in LOSSES if kind in models]
    samples = sample_all(models, text, judge, args)
    hidden = infilling(models, text, judge, args)
    return nats, samples, hidden

def main(argv):
    args = parse(argv)
    device, out = flm.setup(args), Path(args.out or args.runs[0])
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    tables = [evaluate_run(Path(folder), args, device) for folder in args.runs]
    kinds = []
    for _, samples, _ in tables:
        kinds.append([(row["model"], row["steps"]) for row in samples])
    if any(kinds[0] != other for other in kinds):
        raise UserError(f"{' '.join(args.runs)}: contain different models; pass one folder")
    nats, samples, hidden = map(over_runs, zip(*tables))
    print_table("nats per held-out token (flm and mdlm: upper bounds)", nats)
    print_table(f"{args.num_samples} samples per run; judge: {args.judge}", samples)
    if hidden:
        print_table("held-out texts with hidden tokens: share restored", hidden)
    report = dict(vars(args), likelihood=nats, samples=samples, infilling=hidden)
    part = out / "quality.part"  # replaces the old file, completely or not at all
    part.write_text(json.dumps(report, indent=1))
    part.replace(out / "quality.json")
    plot(samples, out / "quality.png")

if __name__ == "__main__":
    flm.run(main)
