"""Seconds of a training step: ours, the textbook's, and the least that a language model of this network can take.

    python bench.py                                  # V = 50257, D = 256, 4 blocks, 1024 tokens, float32
    python bench.py --vocab 30522 --rows 64

limit         a masked language model: the same network, head and optimizer, its input a look-up
linear        flm.py's step: states and noise in D dimensions
posterior     flm.py's step: states and noise in V dimensions
materialised  the paper's formulas as they stand: one-hots, noise and their cross-entropy in V dimensions
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import flm
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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in dict(vocab=50257, width=256, depth=4, rows=8, seq_len=128, repeats=7, threads=0).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.width % 64 or args.width < 64:
        raise UserError(f"--width {args.width}: must be a multiple of 64, the width of a head")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
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
