"""Judges samples: perplexity under an n-gram model of the training text, entropy, variety, and likeness to the flow.

    python evaluate.py --run-dir runs/words

The judge reads a text up to its first end token. Low perplexity with low entropy is collapse: never quote one without the
other. "as flow" is the share of tokens that equal those of the flow's 256-step text from the same noise.
"""

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

import distill
import flm
from data import UserError
from run import Parser, guard, setup


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

    def perplexity(self, texts: Sequence[Sequence[int]], end: int) -> float:
        """exp of the mean negative log-probability of all tokens up to and including each text's first end token."""
        texts = [until_end(text, end) for text in texts]
        nats = [-math.log(self.probability(text[:i], text[i])) for text in texts for i in range(len(text))]
        return math.exp(sum(nats) / len(nats))


def until_end(text: Sequence[int], end: int) -> Sequence[int]:
    """The tokens up to and including the first end token."""
    return text[: text.index(end) + 1] if end in text else text


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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run-dir", default="runs/words", help="folder of a finished run")
    parser.add_argument("--num-samples", type=int, default=1000, help="texts judged")
    parser.add_argument("--seed", type=int, default=0, help="of their noise")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples}: must be 1 or more")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder, n = Path(args.run_dir), args.num_samples
    model = flm.load(folder / "flm.pt", setup(args.device, args.threads))
    dataset = flm.text_of(folder)
    corpus = flm.corpus_of(replace(model.config, dataset=dataset))
    flm.check_text(model, corpus, dataset)
    bayes = flm.Transformer(replace(model.config, parameterization="posterior", depth=0), model.V, corpus.log_p)
    torch.nn.init.zeros_(bayes.head.weight)
    loss, context_free = (sum(flm.held_out_loss(net, flm.flow_loss, corpus, sys.maxsize)) / 10
                          for net in (model, bayes.to(model.device)))
    print(f"held-out loss {loss:.4f} nats a position, {loss / context_free:.3f} of Bayes' rule without context "
          f"({context_free:.4f})")
    train, heldout = (corpus.batch(split, 0, range(corpus.blocks(split))) for split in ("train", "heldout"))
    padded, end = not corpus.packing, corpus.tokenizer.end
    nats, batch, draws = [], flm.rows_at_once(model), 8 * len(heldout)  # each row at 8 times
    for start in range(0, draws, batch):
        index = range(start, min(start + batch, draws))
        tokens = heldout[torch.tensor(index) % len(heldout)].to(model.device)
        nats.append(likelihood_bound(model, tokens, flm.Rows(args.seed, -2, index, draws)).double())
    train, heldout = train.tolist(), heldout.tolist()
    real = [[until_end(row, end) if padded else row for row in rows] for rows in (train, heldout)]
    counts, tokens = Counter(chain(*real[0])), list(chain(*real[1]))
    unigram = sum(math.log((counts.total() + model.V) / (counts[token] + 1)) for token in tokens) / len(tokens)
    a_token = torch.cat(nats) * len(heldout) / len(tokens)
    print(f"held-out likelihood: at most {a_token.mean():.3f} +- {a_token.std() / draws**0.5:.3f} nats a token "
          f"({a_token.mean() / math.log(2):.3f} bits), by unigram frequencies {unigram:.3f}", flush=True)
    order = 5 if corpus.tokenizer.kind == "chars" else 3
    judge = NGram(real[0], model.V, order)
    reference = flm.sample(model, n, 256, args.seed).tolist()

    def line(name: str, rows: list[list[int]], same: bool = True) -> None:
        texts = [until_end(row, end) if padded else row for row in rows]
        print(f"{name:12}{judge.perplexity(texts, end):12.2f}{unigram_entropy(texts):12.3f}"
              f"{len(set(map(tuple, texts))) / len(texts):12.3f}"
              + f"{likeness(rows, reference, end, padded):12.3f}" * same, flush=True)
    print(f"{'':12}{'perplexity':>12}{'entropy':>12}{'distinct':>12}{'as flow':>12}   ({n} samples, {order}-gram judge)")
    line("held out", heldout[:n], same=False)
    for steps in (1, 4, 16, 64):
        line(f"flow {steps}", flm.sample(model, n, steps, args.seed).tolist())
    if (folder / "fmlm.pt").exists():
        model = flm.load(folder / "fmlm.pt", model.device)
        for steps in (1, 2, 4):
            line(f"map {steps}", distill.sample(model, n, steps, args.seed).tolist())


if __name__ == "__main__":
    sys.exit(guard(main))
