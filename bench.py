"""How fast, in how much memory: against the paper's formulas as they stand, and against the least a language model takes.

    python bench.py                                  # V = 50257, D = 256, 4 blocks, 8 x 128 tokens
    python bench.py --preset lm1b --bf16             # the network of a preset, on whatever device there is
    python bench.py --what sample distill scale needs --json bench.json
    python bench.py --what data --tokenizer gpt2     # from text to batches

step     a training step. limit: a masked language model, the same network, head and optimizer, its input a look-up; linear:
         flm.py's step, states and noise in D dimensions; posterior: in V dimensions; materialised: the paper's formulas as
         they stand, one-hots, noise and their cross-entropy in V dimensions
sample   texts from the flow, its map, and an autoregressive model with a cache
distill  a step of distill.py against one of flm.py
scale    flm.py's own tokens a second under torchrun, 1 and 2 processes of one thread, a fixed batch a process
needs    memory and operations of large networks, by count: nothing is run
data     tokens a second of the tokenizer, of preparation, and of the loader

Medians of --repeats after one to warm up, the variants in turn, so that a slow moment slows all. GB: what a step allocates
at most, above weights and optimizer states.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
import data
import distill
import flm
import sources
from run import Parser, guard, setup
from sources import UserError

Step = Callable[[], object]

# -------------------------------------------------------------------------------------------------------- 1. Training


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


def network(args: argparse.Namespace, device: torch.device, parameterization: str = "linear", kind: str = "flm"):
    """A network of the sizes asked for."""
    config = flm.Config(width=args.width, depth=args.depth, heads=args.heads, dropout=0, bf16=args.bf16,
                        seq_len=args.seq_len, parameterization=parameterization)
    return flm.Transformer(config, args.vocab, torch.full((args.vocab,), 1 / args.vocab).log(), kind).to(device)


def training(model: flm.Transformer, loss: Callable, args: argparse.Namespace) -> Step:
    """A training step, all of it but the reading of data, on random tokens; compiled on CUDA."""
    if model.device.type == "cuda":
        model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0, fused=True)
    tokens, count = torch.randint(model.V, (args.rows, args.seq_len), device=model.device), iter(range(10**9))

    def step() -> None:
        loss(model, tokens, flm.Rows(0, next(count), range(args.rows), args.rows))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def variant(name: str, args: argparse.Namespace, device: torch.device) -> Step:
    return training(network(args, device, "posterior" if name == "posterior" else "linear"), LOSSES[name], args)


def distillation(name: str, args: argparse.Namespace, device: torch.device) -> Step:
    teacher = network(args, device).requires_grad_(False)
    if device.type == "cuda":
        teacher.compile()
    if name == "flow":
        return training(network(args, device), flm.flow_loss, args)
    student = network(args, device).requires_grad_(True)
    student.embedding.requires_grad_(False)
    return training(student, distill.map_loss("semigroup", teacher), args)


def model_flops(args: argparse.Namespace) -> int:
    """Operations a token of a training step of `limit`: 6 for each weight that is multiplied, and those of attention."""
    matrices = args.depth * 12 * args.width**2 + args.width * args.vocab
    return 6 * matrices + 12 * args.depth * args.seq_len * args.width


# ------------------------------------------------------------------------------------------------------- 2. The clock


def rate(steps: dict[str, Step], repeats: int, device: torch.device, times: int = 1) -> dict[str, float]:
    """Median seconds of each step, taken in turn, of `times` in a row that need not wait for each other."""
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(times):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / times)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def peak(step: Step, device: torch.device) -> int:
    """Bytes that a second step allocates at most, above what there is between steps."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large bfloat16 matrix product, the fastest of 50, each by itself."""
    a, seconds = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 8192**3 / min(seconds)


def bench_steps(make: Callable, names: Sequence[str], against: str, args: argparse.Namespace, device: torch.device) -> list:
    steps = {name: make(name, args, device) for name in names}
    memory = {name: peak(step, device) for name, step in steps.items()}
    seconds = rate(steps, args.repeats, device, times=5 if device.type == "cuda" else 1)
    tokens, best = args.rows * args.seq_len, matrix_rate(device) if device.type == "cuda" else None
    print(f"{'':14}{'s a step':>10}{'tokens/s':>11}{'x ' + against:>13}{'GB':>8}{'x ' + against:>13}{'model TFLOP/s':>15}"
          + f"{'of matrix rate':>16}" * bool(best))
    out = []
    for name in names:
        flops = model_flops(args) * tokens / seconds[name]
        out.append(dict(name=name, seconds=seconds[name], tokens_per_s=tokens / seconds[name], bytes=memory[name],
                        time_ratio=seconds[name] / seconds[against], memory_ratio=memory[name] / memory[against],
                        model_flops=flops, matrix_share=best and flops / best))
        print(f"{name:14}{seconds[name]:10.3f}{tokens / seconds[name]:11.0f}{out[-1]['time_ratio']:13.2f}"
              f"{memory[name] / 1e9:8.2f}{out[-1]['memory_ratio']:13.2f}{flops / 1e12:15.3f}"
              + (f"{flops / best:16.1%}" if best else ""), flush=True)
    return out


# ------------------------------------------------------------------------------------------- 3. Sampling and scaling


def bench_sample(args: argparse.Namespace, device: torch.device) -> list:
    models = {kind: network(args, device, kind=kind).eval() for kind in ("flm", "fmlm", "ar")}
    out = []
    print(f"{'texts at once':>14}{'':12}{'seconds':>10}{'tokens/s':>11}{'x fmlm 1':>11}")
    for n in (1, 16, 128):
        steps = {"fmlm 1": lambda n=n: distill.sample(models["fmlm"], n, 1, 0)}
        steps |= {f"flm {s}": lambda n=n, s=s: flm.sample(models["flm"], n, s, 0) for s in (1, 8, 64) if n == 1}
        steps |= {f"ar {args.seq_len}": lambda n=n: baselines.ar_sample(models["ar"], n, 0, 0)}
        seconds = rate(steps, args.repeats, device)
        for name, value in seconds.items():
            out.append(dict(texts=n, name=name, seconds=value, tokens_per_s=n * args.seq_len / value))
            print(f"{n:14}  {name:10}{value:10.4f}{n * args.seq_len / value:11.0f}{value / seconds['fmlm 1']:11.1f}")
    return out


def bench_scale(args: argparse.Namespace) -> list:
    """The whole program on `words` in processes of one thread, 64 rows each: tokens a second of all, by their log lines but
    the first. Two that know nothing of each other show what the machine allows."""
    def start(folder: str, name: str, processes: int) -> subprocess.Popen:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        return subprocess.Popen([sys.executable, *torchrun, str(Path(__file__).parent / "flm.py"), *(
            f"--run-dir {name} --max-steps 240 --log-every 20 --threads 1 --batch-size {64 * processes}").split()],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rate_of(folder: str, name: str) -> float:
        lines = map(json.loads, Path(folder, name, "flm.log.jsonl").read_text().splitlines())
        return statistics.median([line["tokens_per_s"] for line in lines if "lr" in line][1:])
    out = []
    for name, runs in {"1 process": [1], "2 apart": [1, 1], "2 processes": [2]}.items():
        with tempfile.TemporaryDirectory() as folder:
            names = [f"run{i}" for i in range(len(runs))]
            started = [start(folder, run, processes) for run, processes in zip(names, runs)]
            if any(process.wait() for process in started):
                raise UserError("flm.py under torchrun did not come to its end; run it by itself to see why")
            total = sum(rate_of(folder, run) for run in names)
        out.append(dict(name=name, tokens_per_s=total))
        print(f"{name:14}{total:11.0f} tokens/s{total / out[0]['tokens_per_s']:8.2f} x one", flush=True)
    return out


# ---------------------------------------------------------------------------------------- 4. What large networks need

LARGE = {"170M": dict(), "1B": dict(width=2048, heads=32, depth=16), "7B": dict(width=4096, heads=64, depth=32)}
CARD = 80e9  # bytes


def kept(config: flm.Config) -> float:
    """Bytes that a block keeps for its gradient, for each token and unit of width: counted on a narrow one."""
    L, seen = 131, {}  # no width is a multiple of it, so what is for each token can be told from weights
    block = flm.Block(replace(config, width=64, heads=1, dropout=0.0), False)
    cos, sin = torch.ones(L, 1, 1, 32), torch.zeros(L, 1, 1, 32)

    def keep(x: Tensor) -> Tensor:
        if x.numel() % L == 0:
            seen[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16,
                                                                                    enabled=bool(config.bf16)):
        x = torch.randn(1, L, 64, requires_grad=True)
        block(x, torch.randn(1, config.cond_width), cos, sin)
    for constant in (cos, sin):
        seen.pop(constant.untyped_storage().data_ptr(), None)
    return sum(x.untyped_storage().nbytes() for x in seen.values()) / (L * 64)


def needs(config: flm.Config, V: int, cards: int = 1) -> dict:
    """Parameters, operations a token of a training step, and bytes on each card, by count: of weights, gradients, averages
    and AdamW's two moments, float32, whole or sharded; and of what a row keeps for its gradient.

    Sharded, the embeddings and one block at a time are whole besides, weights and gradients. A chunk of logits, its gradient
    and its copy in bfloat16 take 2.5 GiB. Dropout's masks are not counted.
    """
    D, C = config.width, config.cond_width
    block = 12 * D**2 + 7 * D + 6 * D * (C + 1)
    rest = 2 * V * D + V + D + 2 * (256 * C + C + C * C + C) + 2 * D * (C + 1)
    parameters = config.depth * block + rest
    whole = 4 * 5 * parameters
    return dict(parameters=parameters, cards=cards, state=whole, state_sharded=whole // cards + (4 * 2 * (rest + block)),
                logits=int(2.5 * 2**30), row=int(kept(config) * D * config.depth * config.seq_len),
                flops=6 * (config.depth * 12 * D**2 + V * D) + 12 * config.depth * config.seq_len * D)


def bench_needs() -> list:
    out = []
    print(f"{'':6}{'parameters':>12}{'GFLOP a token':>15}{'cards':>7}{'GB, copies':>12}{'sharded':>9}"
          f"{'rows of 1024 in 80 GB':>24}{'sharded':>9}  flag")
    for name, sizes in LARGE.items():
        config = flm.Config(seq_len=1024, bf16=True, **sizes)
        for cards in (1, 8, 64):
            need = needs(config, 50258, cards)
            room = [max(0, int((CARD - need[name] - need["logits"]) // need["row"])) for name in ("state", "state_sharded")]
            fits = "none" if room[0] >= 8 else "--shard" if cards > 1 and room[1] else "needs more cards"
            out.append(dict(name=name, rows=room[0], rows_sharded=room[1], flag=fits) | need)
            print(f"{name:6}{need['parameters'] / 1e6:11.0f}M{need['flops'] / 1e9:15.2f}{cards:7}{need['state'] / 1e9:12.1f}"
                  + (f"{need['state_sharded'] / 1e9:9.1f}" if cards > 1 else f"{'':9}") + f"{room[0]:24}"
                  + (f"{room[1]:9}" if cards > 1 else f"{'':9}") + f"  {fits}")
    return out


# ----------------------------------------------------------------------------------------------------------- 5. Data


def bench_data(args: argparse.Namespace) -> list:
    """On the speeches, twenty times over."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is a process
    kind, out = args.tokenizer, []
    documents = [document for batch in sources.find("sotu").batches() for document in batch.texts]

    def measure(name: str, work: Callable[[], int], repeats: int) -> None:
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            rates.append(work() / (time.perf_counter() - start))
        out.append(dict(name=name, tokens_per_s=statistics.median(rates)))
        print(f"{name:40}{out[-1]['tokens_per_s'] / 1e6:8.2f}M tokens/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "speeches.txt")
        text.write_text("\n".join(documents * 20), encoding="utf-8")
        tokenizer = data.make_tokenizer(kind, sources.find(str(text)), 4096)
        print(f"{kind}, {len(documents) * 20} documents, {text.stat().st_size / 1e6:.0f} MB")

        def prepare(workers: int) -> data.Corpus:
            data.MOST_WORKERS = workers
            return data.prepare(str(text), kind, 128, True, 0, 512, vocab_size=4096, cache=f"{folder}/{workers}")
        measure("encoding alone, one core", lambda: sum(map(len, tokenizer.encode(documents))), args.repeats)
        for workers in sorted({1, data.cores()}):
            measure(f"text to token files, processes: {workers}", partial(
                lambda n: sum(map(len, prepare(n).splits.values())), workers), 1)
        corpus = prepare(1)
        measure("token files to batches, one core", lambda: corpus.batch("train", 0, range(51200)).numel(), args.repeats)
    return out


# --------------------------------------------------------------------------------------------------- 6. Command line

WHAT = ("step", "sample", "distill", "scale", "needs", "data")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--what", nargs="+", default=["step"], choices=WHAT, help="tables to print")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="take the sizes of this preset")
    for name in ("vocab", "width", "depth", "heads", "rows", "seq_len", "repeats", "threads"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--tokenizer", default="gpt2", choices=data.TOKENIZERS, help="of data")
    parser.add_argument("--json", default="", help="file for all figures")
    args = parser.parse_args(argv)
    sizes = dict(vocab=50257, width=256, depth=4, rows=8, seq_len=128, repeats=7, threads=0, bf16=False)
    sizes |= PRESETS.get(args.preset, {})
    for name, value in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.heads = args.heads or max(1, args.width // 64)
    for name in ("vocab", "width", "depth", "heads", "rows", "seq_len", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
        if getattr(args, name) > 2**24:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {2**24} or less")
    if not 0 <= args.threads <= 2**10:
        raise UserError(f"--threads {args.threads}: must be 0 or more, 1024 or less")
    if args.width % (2 * args.heads):
        raise UserError(f"--width {args.width}: must be a multiple of twice --heads {args.heads}")
    return args


def preset(name: str, vocab: int, rows: int) -> dict:
    config = flm.Config(**flm.PRESETS[name])
    return dict(vocab=vocab, rows=rows, width=config.width, depth=config.depth, heads=config.heads, seq_len=config.seq_len)


PRESETS = {name: preset(name, *sizes) for name, sizes in dict(words=(27, 128), sotu=(4096, 32), lm1b=(30522, 256),
                                                              owt=(50258, 32)).items()}


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = setup(args.device, args.threads)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    report = dict(vars(args), device=str(device), card=card, torch=torch.__version__)
    if {"step", "sample", "distill"} & set(args.what):
        print(f"V {args.vocab}, D {args.width}, {args.depth} blocks, {args.rows} x {args.seq_len} tokens, {device}, {card}, "
              f"{'bfloat16' if args.bf16 else 'float32'}, torch {torch.__version__}, median of {args.repeats}")
    for what in args.what:
        print(f"\n{what}")
        report[what] = {
            "step": lambda: bench_steps(variant, tuple(LOSSES), "limit", args, device),
            "distill": lambda: bench_steps(distillation, ("flow", "map"), "flow", args, device),
            "sample": lambda: bench_sample(args, device), "scale": lambda: bench_scale(args),
            "needs": bench_needs, "data": lambda: bench_data(args)}[what]()
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(report, indent=1))
        except OSError as error:
            raise UserError(f"{args.json}: cannot be written ({error.strerror}); give another --json") from None


if __name__ == "__main__":
    sys.exit(guard(main))
