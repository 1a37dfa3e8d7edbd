"""Compares the models of a run at equal diversity of their samples.

    python -m extras.evaluate runs/sentences                 # writes quality.json and quality.png
    python -m extras.evaluate runs/a runs/b runs/c           # mean and deviation, files in runs/a
    python -m extras.evaluate runs/lm1b --judge gpt2-large   # perplexity under a language model

A lower temperature lowers both the perplexity and the diversity of texts. So each model has a curve
over temperatures, and perplexities are compared where two curves have the same diversity.

perplexity  of the samples, up to their first end token: per word under 4-grams of the training
            text (with a character tokenizer, 5-grams of characters), or per token under --judge
diversity   entropy of the pooled bigrams of tokens, without end tokens, of all samples in nats
variation   total variation distance between these bigrams and those of other held-out texts.
            Both depend on the number of bigrams: all rows use the smallest number of any row
length      tokens per sample, including its end token
distinct    share of different samples; training: share of samples in the training text
entropy     of the tokens within a sample, as in papers. It does not show that samples are alike
reverse     with --reverse: perplexity of held-out text under 4-grams of 4,000 samples
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from functools import partial
from itertools import chain, groupby, pairwise, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import data
import distill
import flm
from data import UserError
from extras import baselines

MOST = 2**22  # tokens to read from a split
TEMPERATURES = 0.7, 0.8, 0.9, 1.0, 1.1
STEPS = dict(flm=[16, 64], fmlm=[1, 2, 4], mdlm=[1, 2, 4, 8, 16, 64])  # ar: L
FOR_REVERSE = 4000  # texts of which the 4-grams of a reverse perplexity are made

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

def make_ngram(text, texts):
    """4-grams of the words of texts; 5-grams of characters for a character tokenizer."""
    V = 1 + len(set(chain.from_iterable(text.items(text.train))))  # 1 for unknown items
    return NGram(text.items(texts), V, order=5 if text.tokenizer.kind == "chars" else 4)

def ngram_judge(text):
    ngram = make_ngram(text, text.train)
    return lambda texts: ngram.perplexity(text.items(texts))

def model_judge(name, text, device):
    """A causal language model of `transformers`, which reads the first 1,024 tokens of a text."""
    with data.readable(f"--judge {name}", "pip install transformers, or pass a local folder"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        codec = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    codec.pad_token, codec.padding_side = codec.eos_token, "right"
    most = min(1024, model.config.max_position_embeddings)

    @torch.no_grad()
    def judge(texts):
        nats, cut = [], 0
        for i in range(0, len(texts), 16):
            lines = list(map(text.tokenizer.decode, texts[i : i + 16]))
            batch = codec(lines, padding=True, return_tensors="pt").to(device)
            mask = batch.attention_mask
            cut += mask[:, most:].any(1).sum().item()
            ids, mask = batch.input_ids[:, :most], mask[:, :most]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=ids, attention_mask=mask).logits
            part = flm.cross_entropy(logits[:, :-1].float(), ids[:, 1:])
            nats.append(part[mask[:, 1:] > 0].cpu())
        if cut:
            flm.report(f"{cut} of {len(texts)} texts are cut to {most} tokens of the judge")
        return torch.cat(nats).mean().exp().item()
    return judge

def until_end(ids, end, start=0):
    """The ids up to the first end token, included, at or after `start`."""
    return ids[: ids.index(end, start) + 1] if end in ids[start:] else ids

def frequencies(items):
    """Relative frequencies by item; 0 if it does not occur."""
    counts = Counter(items)
    total = counts.total()
    return Counter({item: count / total for item, count in counts.items()})

def entropy(p):
    """Entropy of relative frequencies in nats."""
    return -sum(x * math.log(x) for x in p.values())

def total_variation(p, q):
    """Half the sum of the absolute differences of relative frequencies."""
    items = p.keys() | q.keys()
    return sum(abs(p[item] - q[item]) for item in items) / 2

class Text:
    """The text of a corpus, and measures of samples relative to it.

    train, heldout: texts, tuples of ids. rows: the held-out rows (n, L), in random order."""

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
        """The characters or the words of texts. An end token or a line break is the word </s>."""
        if self.tokenizer.kind == "chars":
            return texts
        lines = [self.tokenizer.decode(ids) + "\n" * (ids[-1] == self.end) for ids in texts]
        return [tuple(line.replace("\n", " </s> ").split()) for line in lines]

    def bigrams(self, texts):
        """The bigrams of texts, in order, without end tokens: these would favour long texts."""
        return [pair for text in texts for pair in pairwise(text) if self.end not in pair]

    def perplexity(self, judge, rows):
        """Perplexity under the judge of rows (n, L) up to their first end token."""
        start = self.corpus.frame
        return judge([until_end(ids, self.end, start) for ids in rows.tolist()])

    def measure(self, judge, rows, count=None):
        """The measures of samples (n, L) by name, with `count` bigrams (None: all)."""
        texts, train = self.texts(rows), set(self.train)
        n = len(texts)
        others = self.heldout[n:] or self.heldout  # not the ones that are measured
        pairs = frequencies(self.bigrams(texts)[:count])
        return dict(
            perplexity=self.perplexity(judge, rows),
            diversity=entropy(pairs),
            variation=total_variation(pairs, frequencies(self.bigrams(others))),
            length=mean(map(len, texts)),
            distinct=len(set(texts)) / n,
            training=mean(text in train for text in texts),
            entropy=mean(entropy(frequencies(text)) for text in texts))

    def reverse(self, texts):
        """Perplexity of the held-out text under 4-grams of texts."""
        return make_ngram(self, texts).perplexity(self.items(self.heldout))

def likelihood_bound(model, tokens, last=0.999):
    """Estimates a bound on -log p: tokens (B, L) -> nats per position (B,), random times tau (B,).

    -log p <= 1/2 int_0^M E|x1 - D|^2 d(m^2) - E log D(x1), with m = t/(1-t), so m^2 is the ratio of
    signal to noise, M = m(tau = last)^2, and the last term at tau = last (Kingma et al. 2021).
    Distances are measured where the noise is white: in R^V, or in R^D after chol(W^T W)^-1.
    """
    noise, clean = model.noise(len(tokens)), model.clean(tokens)
    end = torch.full((len(tokens),), last, device=tokens.device)
    t_end = model.clock.t(end)
    M = (t_end / (1 - t_end)) ** 2
    m = torch.sqrt(flm.uniform_times(len(tokens), tokens.device) * M)
    t = m / (1 + m)

    def logits(t):
        state = torch.lerp(noise, clean, t[:, None, None])
        return model(state, model.clock.tau(t))

    probs = logits(t).softmax(-1)
    if model.V <= model.config.width:
        error = F.one_hot(tokens, model.V) - probs
    else:
        error = (clean - model.clean(probs)).mT
        error = torch.linalg.solve_triangular(model.factor(), error, upper=False)
    error = error.square().sum((1, 2)) / tokens.shape[1]
    nats = flm.cross_entropy(logits(t_end), tokens).mean(1)
    return M / 2 * error + nats, model.clock.tau(t)

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

@torch.no_grad()
def copied(model, text):
    """Share of held-out tokens that a flow restores at m = t/(1-t) = 100."""
    tokens = text.rows[: flm.forward_rows(model)].to(model.embedding.device)
    t = torch.tensor(100 / 101, device=tokens.device)
    state = (1 - t) * model.noise(len(tokens)) + t * model.clean(tokens)
    logits = model(state, model.clock.tau(t).expand(len(tokens)))
    right = logits.argmax(-1) == tokens
    return right[tokens != text.end].float().mean().item()

SAMPLERS = dict(flm=flm.sample, fmlm=distill.sample, **baselines.SAMPLERS)

def parse(argv):
    parser = flm.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", default=["runs/sentences"], help="folders of finished runs")
    add("--judge", default="words", help="words, or a causal language model of transformers")
    add("--reverse", action="store_true", help=f"also sample {FOR_REVERSE} texts of each model")
    add("--num-samples", type=int, default=500, help="texts per row of the table")
    add("--seed", type=int, default=0, help="seed of the first run; + 100 for each other")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise UserError("--num-samples: must be at least 1")
    return args

def load_run(folder, device):
    """The models of a run by kind, and its text. Raises UserError if they do not fit."""
    models, sources = {}, {}
    for kind in ("flm", "fmlm", "mdlm", "ar"):
        path = folder / f"{kind}.pt"
        if path.exists() or kind == "flm":
            models[kind] = baselines.load(path, device)
            sources[kind] = flm.load_checkpoint(path)["source"]
    config = models["flm"].config
    corpus = data.prepare(config.dataset, config.tokenizer, config.seq_len, config.packing,
                          config.vocab_size, config.data_dir)
    for kind, model in models.items():
        same_text = sources[kind] in ("", corpus.meta["source"])
        shape = model.config.seq_len, model.config.packing
        if not same_text or shape != (corpus.seq_len, corpus.packing):
            raise UserError(f"{folder}/{kind}.pt: of another text or --seq-len; train it again")
    return models, Text(corpus)

def sample_all(models, text, args, seed):
    """Samples of each model by (name, steps, temperature), and reverse perplexities by the same."""
    from tqdm import tqdm
    cells = []
    for name in models:
        steps = STEPS.get(name, [text.corpus.seq_len])
        cells += product([name], steps, [1.0] if name == "fmlm" else TEMPERATURES)
    held_out = "held-out text", None, None
    samples, reverse = {held_out: text.rows[: args.num_samples]}, {}
    if args.reverse:
        reverse[held_out] = text.reverse(text.train[:FOR_REVERSE])
    for name, k, temperature in tqdm(cells, unit="cell", disable=None):
        sample = partial(SAMPLERS[name], models[name])
        samples[name, k, temperature] = sample(args.num_samples, k, seed, temperature)
        if args.reverse and temperature == 1 and (name == "ar" or k <= 16):
            rows = sample(FOR_REVERSE, k, seed + 1)
            reverse[name, k, temperature] = text.reverse(text.texts(rows))
    return samples, reverse

def measure_all(runs, judges):
    """The table of each run (text, samples, reverse), with as many bigrams in every row."""
    count = min(len(text.bigrams(text.texts(rows)))
                for text, samples, _ in runs for rows in samples.values())
    tables = []
    for (text, samples, reverse), judge in zip(runs, judges):
        tables.append([])
        for cell, rows in samples.items():
            row = dict(zip(("model", "steps", "temperature"), cell))
            row |= text.measure(judge, rows, count)
            row["reverse"] = reverse.get(cell)
            tables[-1].append(row)
    return tables

def curves(rows):
    """The rows of each (model, steps), one per temperature."""
    return {key: list(curve) for key, curve in groupby(rows, itemgetter("model", "steps"))}

def at_diversity(curve, diversity, measure):
    """A measure where a curve has this diversity, or None: logarithmic between temperatures."""
    points = sorted((row["diversity"], row[measure]) for row in curve)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= diversity <= x1 and x0 < x1:
            weight = (diversity - x0) / (x1 - x0)
            return y0 ** (1 - weight) * y1**weight

def at_equal_diversity(rows):
    """For the text and each model at temperature 1: the perplexity of all at its diversity."""
    table = []
    for row in plain(rows):
        line = {name: row[name] for name in ("model", "steps", "diversity", "perplexity")}
        for (name, steps), curve in curves(rows).items():
            if len(curve) > 1:
                line[f"{name} {steps}"] = at_diversity(curve, row["diversity"], "perplexity")
        table.append(line)
    return table

def plain(rows):
    return [row for row in rows if row["temperature"] in (None, 1)]

def as_good_as(rows):
    """For flow and map at temperature 1: in how many steps masked diffusion is as good."""
    diffusion = {key[1]: curve for key, curve in curves(rows).items() if key[0] == "mdlm"}
    table = []
    for row in plain(rows):
        if row["model"] in ("flm", "fmlm"):
            line = dict(model=row["model"], steps=row["steps"])
            for measure in ("perplexity", "variation"):
                points = {steps: at_diversity(curve, row["diversity"], measure)
                          for steps, curve in diffusion.items()}
                line[measure] = steps_of(points, row[measure])
            points = {steps: plain(curve)[0]["reverse"] for steps, curve in diffusion.items()}
            table.append(line | dict(reverse=steps_of(points, row["reverse"])))
    return table

def steps_of(points, value):
    """The steps in which a measure has this value, as text; points: its value by steps."""
    points = [(steps, y) for steps, y in points.items() if y]
    if not points or not value:
        return ""
    if value > points[0][1]:
        return f"< {points[0][0]}"
    for (k0, y0), (k1, y1) in pairwise(points):
        if y1 <= value <= y0 and y1 < y0:
            return f"{k0 * (k1 / k0) ** (math.log(y0 / value) / math.log(y0 / y1)):.2g}"
    return f"> {points[-1][0]}"

def over_runs(tables):
    """Merges the tables of several runs: mean, and standard deviation as name_sd."""
    merged = []
    for rows in zip(*tables):
        merged.append(dict(rows[0]))
        for name in rows[0].keys() - {"temperature"}:
            values = [row[name] for row in rows]
            if isinstance(values[0], float):
                merged[-1][name] = mean(values)
                if len(values) > 1:
                    merged[-1][f"{name}_sd"] = stdev(values)
    return merged

def print_table(title, rows):
    """Prints rows, which are dicts. The cell of a missing value is empty."""
    names = [name for name in rows[0] if not name.endswith("_sd")]
    table = [names]
    for row in rows:
        cells = []
        for name in names:
            x, sd = row[name], row.get(f"{name}_sd")
            text = f"{x:.4g}" if isinstance(x, float) else str(x or "")
            cells.append(text if sd is None else f"{text} ± {sd:.2g}")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))

STYLES = dict(flm="o-", mdlm="D--", ar="v-.", fmlm="^:")
NAMES = dict(flm="flow", mdlm="masked diffusion", ar="autoregressive", fmlm="map")

def plot(rows, path):
    """Perplexity against diversity, over temperatures; variation against network evaluations."""
    os.environ["MPLBACKEND"] = "agg"  # Jupyter's does not exist in other programs
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    heldout, *rows = rows
    for name, style in STYLES.items():
        mine = [row for row in rows if row["model"] == name]
        if mine:
            steps = max(row["steps"] for row in mine)
            most = [row for row in mine if row["steps"] == steps or name == "fmlm"]
            for axes, x, y, points in ((left, "diversity", "perplexity", most),
                                       (right, "steps", "variation", plain(mine))):
                axes.errorbar([row[x] for row in points], [row[y] for row in points],
                              [row.get(f"{y}_sd", 0) for row in points], fmt=style, capsize=2,
                              label=NAMES[name])
    left.plot(heldout["diversity"], heldout["perplexity"], "k*")
    right.axhline(heldout["variation"], color="black", lw=0.8)
    left.set(yscale="log", xlabel="diversity: entropy of bigrams (nats)", ylabel="perplexity",
             title="most steps, T = .7 to 1.1 (map: all steps); star: held-out text")
    right.set(xscale="log", xlabel="network evaluations per text",
              ylabel="total variation of bigrams", title="temperature 1; line: held-out text")
    right.legend()
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    part.replace(path)

def evaluate_run(folder, args, device, seed):
    """(text, samples, reverse) of a run, and its table of likelihoods."""
    models, text = load_run(folder, device)
    nats = []
    for kind in filter(models.get, LOSSES):
        row = dict(model=kind, nats=likelihood(models[kind], kind, text, args.num_samples))
        row["copied"] = copied(models[kind], text) if kind == "flm" else None
        nats.append(row)
    return (text, *sample_all(models, text, args, seed)), nats

def main(argv):
    args = parse(argv)
    device, out = flm.setup(args), Path(args.runs[0])
    runs, nats = zip(*(evaluate_run(Path(folder), args, device, args.seed + 100 * i)
                       for i, folder in enumerate(args.runs)))
    if len({tuple(samples) for _, samples, _ in runs}) > 1:
        raise UserError(f"{' '.join(args.runs)}: contain different models; pass one folder")
    judges = [ngram_judge(text) if args.judge == "words" else model_judge(args.judge, text, device)
              for text, _, _ in runs]
    nats, samples = map(over_runs, (nats, measure_all(runs, judges)))
    tables = {"nats per held-out token (flm and mdlm: upper bounds)": nats,
              f"{args.num_samples} samples per run; judge: {args.judge}": samples,
              "perplexity of the curves at the diversity of a row": at_equal_diversity(samples),
              "as good as masked diffusion in how many steps, by": as_good_as(samples)}
    for title, rows in tables.items():
        print_table(title, rows)
    part = out / "quality.part"  # replaces the old file, completely or not at all
    part.write_text(json.dumps(dict(vars(args), tables=tables), indent=1))
    part.replace(out / "quality.json")
    plot(samples, out / "quality.png")

if __name__ == "__main__":
    flm.run(main)
