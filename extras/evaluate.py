"""Compares the models of a run: quality of their texts, network evaluations, likelihood.

    python -m extras.evaluate --run-dir runs/sentences     # tables; quality.json and quality.png
    python -m extras.evaluate --temperatures 1.3 1.15 1 .9 .8 .7    # compare at equal entropy
    python -m extras.evaluate --judge gpt2-large           # needs pip install transformers

perplexity  of the samples under a judge: n-grams of the training text, the run's own ar
            or a Hugging Face model. It reads a text up to its first end token.
entropy     of the token frequencies within a sample in nats, mean over samples. Low perplexity
            with low entropy is collapse, so compare perplexities at equal entropy only.
length      tokens per text, with its end token
bigrams     entropy of the pooled bigrams of all samples in nats
variation   total variation between bigrams of samples and of other held-out texts
distinct    share of different samples; training, held_out: share of samples that occur there
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import Counter
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import flm
from data import UserError
from extras import baselines

MOST = 2**22  # tokens of a split that are read

# A judge is a function from texts (lists of ids) to their perplexity: exp of the mean nats.

class NGram:
    """Interpolated Kneser-Ney (Chen and Goodman 1999), one discount n1 / (n1 + 2 n2) per order.

    texts: sequences of V different tokens. The longest n-grams and those at the start of a text
    are counted as they occur, shorter ones by the number of different tokens before them.
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
        self.total, self.kinds = Counter(), Counter()  # of the tokens after a context
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

    def __call__(self, texts):
        nats = []
        for text in texts:
            for i, token in enumerate(text):
                context = text[max(0, i - self.order) : i]
                nats.append(-math.log(self.probability(context, token)))
        return math.exp(mean(nats))

def ar_judge(model):
    """The run's own autoregressive model. It judges its own samples too well."""
    @torch.no_grad()
    def judge(texts):
        rows = [torch.tensor(text) for text in texts]
        rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        nats = []
        for part in rows.split(flm.batch_rows(model)):
            tokens = part.clamp(min=0).to(model.device)
            nats.append(baselines.ar_nats(model, tokens).cpu())
        return math.exp(torch.cat(nats)[rows >= 0].mean())
    return judge

def hugging_face_judge(name, tokenizer, device):
    """A causal language model by name or folder. The first token of a text is not scored.

    Our end token becomes its own. Raises UserError if transformers or the model is missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        codec = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except Exception as error:  # its loaders raise many kinds
        raise UserError(f"--judge {name}: could not be loaded ({type(error).__name__}); "
                        "pip install transformers, or use --judge ngram or ar") from None
    longest = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def judge(texts):
        nats = []
        for text in texts:
            ids = codec(tokenizer.decode(text)).input_ids
            if text[-1] == tokenizer.end and codec.eos_token_id is not None:
                ids.append(codec.eos_token_id)
            row = torch.tensor([ids[:longest]], dtype=torch.long, device=device)
            if len(ids) > 1:
                logits = model(row).logits[:, :-1].float()
                nats.append(baselines.token_nats(logits, row[:, 1:])[0])
        return math.exp(torch.cat(nats).mean()) if nats else math.nan
    return judge

def make_judge(name, models, text, device):
    """The judge `name` and its title."""
    if name == "ngram":
        order = 5 if text.tokenizer.kind == "chars" else 4
        return NGram(text.train, models["flm"].V, order), f"{order}-grams"
    if name == "ar":
        return ar_judge(models["ar"]), "the run's own ar"
    return hugging_face_judge(name, text.tokenizer, device), name

def until_end(ids, end, start=0):
    """The ids up to the first end token, included, at or after `start`."""
    return ids[: ids.index(end, start) + 1] if end in ids[start:] else ids

def frequencies(items):
    """Relative frequencies by item."""
    counts = Counter(items)
    total = counts.total()
    return {item: count / total for item, count in counts.items()}

def entropy(p):
    """Of relative frequencies, in nats."""
    return -sum(x * math.log(x) for x in p.values())

def total_variation(p, q):
    """Half the sum of the absolute differences of relative frequencies."""
    return sum(abs(p.get(item, 0) - q.get(item, 0)) for item in p.keys() | q.keys()) / 2

def bigrams(texts):
    return frequencies(pair for text in texts for pair in pairwise(text))

class Text:
    """The text of a corpus, and measures of samples against it.

    train, heldout: texts, tuples of ids. rows: the held-out rows (n, L).
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

    def perplexity(self, judge, rows):
        """Under the judge, of rows (n, L) up to their first end token."""
        start = self.corpus.frame
        return judge([until_end(ids, self.end, start) for ids in rows.tolist()])

    def measure(self, judge, rows):
        """The measures of samples (n, L) by name."""
        texts, n = self.texts(rows), len(rows)
        others = self.heldout[n:] or self.heldout  # not those that are measured themselves
        train, heldout = set(self.train), set(self.heldout)
        return dict(
            perplexity=self.perplexity(judge, rows),
            entropy=mean(entropy(frequencies(text)) for text in texts),
            length=mean(map(len, texts)),
            bigrams=entropy(bigrams(texts)),
            variation=total_variation(bigrams(texts), bigrams(others)),
            distinct=len(set(texts)) / n,
            training=mean(text in train for text in texts),
            held_out=mean(text in heldout for text in texts))

def likelihood_bound(model, tokens, rows, last=0.999):
    """A bound on -log p at one random time per row: tokens (B, L) -> nats per position (B,), tau.

    -log p <= 1/2 int_0^t1 SNR'(t) E|x1 - D_t|^2 dt - E log D_t1(x1) with SNR = t^2 / (1-t)^2
    (Kingma et al. 2021) and t1 = t(tau = last), the end of training. The integral runs over tau.
    Distances are taken where the noise is white: in R^V, or in R^D after chol(E^T E)^-1.
    """
    noise, clean = model.noise(rows), model.clean(tokens)

    def logits(tau):
        t = model.clock.t(tau)[:, None, None]
        return model(torch.lerp(noise, clean, t), tau)

    tau = last * rows.times(tokens.device)
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
    return rate.to(error) * error + flm.cross_entropy(end, tokens), tau

LOSSES = dict(flm=likelihood_bound, **baselines.LOSSES)

def likelihood(model, text, n):
    """-log p of n held-out rows, padding included, in nats per token before the padding.

    Exact for ar, an upper bound for flm and mdlm. Each row is evaluated at ten random times.
    """
    by_tau = flm.estimate_loss(model, LOSSES[model.kind], text.corpus, n)
    return mean(by_tau) * text.corpus.seq_len / mean(map(len, text.heldout[:n]))

def hide(text, rows, share, seed):
    """Rows (n, L) with -1 at a random share of their tokens.

    The end token of a padded row and the frame of a packed one stay.
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
    """A row per model and share: hidden tokens restored, and perplexity of the filled texts."""
    pool = torch.tensor([i for ids in text.train for i in ids if i != text.end])

    def chance(n, steps, seed, known):
        generator = torch.Generator().manual_seed(seed)
        drawn = pool[torch.randint(len(pool), known.shape, generator=generator)]
        return torch.where(known < 0, drawn, known)

    samplers = {("chance", 0): chance}
    for name in ("flm", "fmlm", "mdlm"):
        for steps in sorted({min(args.steps), max(args.steps)}):
            if name in models:
                samplers[name, steps] = partial(SAMPLERS[name], models[name])
    rows, table = text.rows[: args.num_samples], []
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

SAMPLERS = {"flm": flm.sample, "flm ancestral": partial(flm.sample, sampler="ancestral"),
            "fmlm": distill.sample, **baselines.SAMPLERS}
WITH_TEMPERATURE = "flm ancestral", "mdlm", "ar"

def parse(argv):
    parser = flm.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--run-dir", default="runs/sentences", help="folder of a finished run")
    add("--judge", default="ngram", help="ngram, ar or a Hugging Face model")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="evaluations per text")
    add("--temperatures", type=float, nargs="+", default=[1.0], help="of flm ancestral, mdlm, ar")
    add("--num-samples", type=int, default=1000, help="texts per row of the table")
    add("--seed", type=int, default=0, help="of the samples")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    args = parser.parse_args(argv)
    for name in ("steps", "temperatures", "num_samples"):
        if np.min(value := getattr(args, name)) <= 0:
            raise UserError(f"{flm.flag_of(name)} {value}: must be greater than 0")
    return args

def load_run(folder, judge, device):
    """The models of a run by kind, and its text. Raises UserError if they do not fit."""
    models = {}
    for kind in ("flm", "fmlm", "mdlm", "ar"):
        path = folder / f"{kind}.pt"
        if path.exists() or kind in ("flm", judge):
            models[kind] = baselines.load(path, device)
    corpus = flm.prepare_corpus(models["flm"].config)
    expected = corpus.meta["source"], corpus.seq_len, corpus.packing
    for kind, model in models.items():
        source, config = model.source or expected[0], model.config
        if (source, config.seq_len, config.packing) != expected:
            raise UserError(f"{folder}/{kind}.pt: was trained on another text or other rows than "
                            "the flow uses now; train it again with --overwrite")
    return models, Text(corpus)

def sample_all(models, text, judge, args):
    """Samples and measures each model with each number of steps and each temperature."""
    from tqdm import tqdm

    cells = []
    for name in SAMPLERS:
        steps = [text.corpus.seq_len] if name == "ar" else args.steps
        temperatures = {1.0, *args.temperatures} if name in WITH_TEMPERATURE else [1.0]
        if name.split()[0] in models:
            cells += product([name], steps, sorted(temperatures))
    table = []
    for name, steps, temperature in tqdm(cells, unit="cell", file=sys.stderr):
        options = dict(temperature=temperature) if temperature != 1 else {}
        model, start = models[name.split()[0]], time.perf_counter()
        rows = SAMPLERS[name](model, args.num_samples, steps, args.seed, **options)
        seconds = time.perf_counter() - start
        table.append(dict(model=name, steps=steps, temperature=temperature)
                     | text.measure(judge, rows) | dict(seconds=seconds))
    return table

def print_table(title, rows):
    """Prints rows, which are dicts; a column that a row lacks is empty."""
    table = [list(dict.fromkeys(chain.from_iterable(rows)))]
    for row in rows:
        values = [row.get(name) for name in table[0]]
        values = [f"{x:.4g}" if isinstance(x, float) else x for x in values]
        table.append(["" if x is None else str(x) for x in values])
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)))

def plot(report, path):
    """Perplexity against network evaluations at temperature 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    heldout, *rows = report["samples"]
    rows = [row for row in rows if row["temperature"] == 1]
    for name in dict.fromkeys(row["model"] for row in rows):
        points = [(row["steps"], row["perplexity"]) for row in rows if row["model"] == name]
        axes.plot(*zip(*points), "o-", label=name)
    axes.axhline(heldout["perplexity"], color="gray", linestyle="--", label="held-out text")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations",
             ylabel=f"perplexity ({report['title']})")
    axes.legend()
    figure.savefig(path, dpi=150)

def main(argv):
    args = parse(argv)
    folder, device = Path(args.run_dir), flm.setup(args)
    models, text = load_run(folder, args.judge, device)
    judge, title = make_judge(args.judge, models, text, device)

    nats = []
    for kind in LOSSES:
        if kind in models:
            value = likelihood(models[kind], text, args.num_samples)
            nats.append(dict(model=kind, nats=value))
    print_table("nats per held-out token (flm and mdlm: upper bounds)", nats)

    heldout = dict(model="held-out text", steps=None, temperature=None)
    heldout |= text.measure(judge, text.rows[: args.num_samples])
    samples = sample_all(models, text, judge, args)
    samples.insert(0, heldout)
    print_table(f"{args.num_samples} samples; perplexity under {title}", samples)

    report = dict(vars(args), title=title, likelihood=nats, samples=samples, infilling=[])
    if models["flm"].takes_prompts:
        report["infilling"] = infilling(models, text, judge, args)
        print_table("held-out texts with hidden tokens: share restored", report["infilling"])
    (folder / "quality.json").write_text(json.dumps(report, indent=1))
    plot(report, folder / "quality.png")

if __name__ == "__main__":
    flm.run_command(main)
