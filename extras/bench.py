"""Speed and memory of training, sampling and distillation.

    python -m extras.bench                                  # V = 50257, D = 256, 4 blocks, 8 x 128
    python -m extras.bench --preset lm1b --bf16             # the network of a preset
    python -m extras.bench --what sample                    # also distill
    OMP_NUM_THREADS=1 python -m extras.bench                # one thread on a CPU

step     a training step on random tokens. masked: masked diffusion, the lower limit of cost; flow:
         flm.flow_loss; materialised: the paper's formulas, with vectors in V dimensions
sample   texts of the map (1 step), of the flow and of an autoregressive model with a cache
distill  a step of distill.py against a step of flm.py

Times are medians of --repeats runs after one warm-up run. The variants run in turn, so that a
temporary slowdown of the machine affects all of them. gb: the peak memory of a step, in addition to
weights and optimizer states. matrix_share (on CUDA): the speed in operations per second, relative
to a large bfloat16 matrix product.
"""

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import data
import distill
import flm
from extras import baselines

SIZES = dict(vocab_size=50257, width=256, depth=4, heads=4, tokenizer="bpe")
PRESETS = {  # differences from flm.PRESETS: actual V, and batches for one device
    "sentences": {}, "words": dict(vocab_size=27), "sotu": {},
    "lm1b": dict(vocab_size=30522, batch_size=256), "owt": dict(vocab_size=50258, batch_size=32)}
setting = partial(flm.setting, "bench")

@dataclass
class Config(flm.Config):
    """Settings of the networks and of the benchmark; V is vocab_size."""

    what: str = setting("step", "table to print", ("step", "sample", "distill"))
    preset: str = setting("", "use the sizes of this preset of flm.py", tuple(PRESETS))
    batch_size: int = setting(8, "rows of a batch (B)")
    repeats: int = setting(7, "timed runs of each variant")
    device: str = setting("auto", "device of the networks", ("auto", "cpu", "cuda", "mps"))
    bf16: bool | None = setting(None, "bfloat16 matrix products (default: on CUDA only)")

# ---------------------------------------------------------------------------- 1. Training steps
def materialised_loss(model, tokens):
    """The loss of the flow (B,), with all of its vectors in V dimensions."""
    tau = flm.uniform_times(len(tokens), tokens.device)
    t = model.clock.t(tau)[:, None, None]
    one_hot = F.one_hot(tokens, model.V).float()
    x = (1 - t) * torch.randn_like(one_hot) + t * one_hot  # (B, L, V)
    logits = model(x @ model.embedding, tau)
    return flm.cross_entropy(logits, one_hot).mean(1), tau

def build(config, network=flm.Transformer):
    """An untrained network."""
    tokenizer = data.Tokenizer(dict(kind="ids", vocab_size=config.vocab_size))
    return flm.build(config, tokenizer, torch.device(config.device), config.bf16, network)

def training_step(model, loss):
    """A function that takes one training step, as flm.train does, on the same random tokens."""
    config, device = model.config, model.embedding.device
    if device.type == "cuda":
        model.compile()
    optimizers = flm.make_optimizers(model, config)
    tokens = torch.randint(model.V, (config.batch_size, config.seq_len), device=device)

    def step():
        nats, _ = loss(model, tokens)
        nats.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return step

# -------------------------------------------------------------------------- 2. Time and memory
def median_seconds(functions, repeats, calls=1):
    """Median seconds of each function by name; `calls` calls are timed together."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}

def peak_bytes(step):
    """Peak number of bytes that the second call of step() allocates."""
    step()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)))

def matrix_share(config, tokens_per_s):
    """Speed relative to a matrix product, at 6 operations per token and weight plus attention."""
    D, L = config.width, config.seq_len
    weights = 12 * config.depth * D**2 + D * config.vocab_size
    operations = 6 * weights + 12 * config.depth * L * D
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = median_seconds(dict(product=lambda: a @ a), 20)
    return operations * tokens_per_s * seconds["product"] / (2 * 8192**3)

# ----------------------------------------------------------------- 3. Tables, as lists of rows
def with_rates(seconds, tokens):
    """The first columns of a table from seconds by name; ratios are relative to the first row."""
    base = next(iter(seconds.values()))
    return [dict(name=name, seconds=x, tokens_per_s=tokens / x, time_ratio=x / base)
            for name, x in seconds.items()]

def compare(steps, config):
    """A table of training steps."""
    on_gpu = torch.cuda.is_initialized()
    memory = [peak_bytes(step) for step in steps.values()]
    seconds = median_seconds(steps, config.repeats, calls=5 if on_gpu else 1)
    table = with_rates(seconds, config.batch_size * config.seq_len)
    for row, size in zip(table, memory):
        row |= dict(gb=size / 1e9, gb_ratio=size / memory[0])
        if on_gpu:
            row["matrix_share"] = matrix_share(config, row["tokens_per_s"])
    return table

def bench_step(config):
    masked_model = build(config, baselines.Baseline)
    return compare(dict(
        masked=training_step(masked_model, baselines.mdlm_loss),
        flow=training_step(build(config), flm.flow_loss),
        materialised=training_step(build(config), materialised_loss)), config)

def bench_distill(config):
    teacher = build(config).requires_grad_(False)
    if teacher.embedding.is_cuda:
        teacher.compile()
    flow_map = build(config, flm.FlowMap)
    flow_map.embedding.requires_grad_(False)
    return compare(dict(
        flow=training_step(build(config), flm.flow_loss),
        map=training_step(flow_map, partial(distill.map_loss, teacher))), config)

def bench_sample(config):
    """A table for 1, 16 and 128 texts; the flow with 8 and 64 steps only for 1 text."""
    flow_map = build(config, flm.FlowMap).eval()
    flow = build(config).eval()
    ar = build(config, baselines.AR).eval()
    table, L = [], config.seq_len
    for n in (1, 16, 128):
        samplers = {"map 1": partial(distill.sample, flow_map, n, 1, 0)}
        for steps in (1, 8, 64) if n == 1 else (1,):
            samplers[f"flow {steps}"] = partial(flm.sample, flow, n, steps, 0)
        samplers[f"ar {L}"] = partial(baselines.ar_sample, ar, n, L, 0)
        seconds = median_seconds(samplers, config.repeats)
        table += [dict(row, texts=n) for row in with_rates(seconds, n * L)]
    return table

# ----------------------------------------------------------------------------- 4. Command line
TABLES = dict(step=bench_step, sample=bench_sample, distill=bench_distill)

def main(argv):
    given = flm.parse(argv, Config, __doc__, groups=("network", "bench"))
    preset = given.get("preset")
    sizes = flm.PRESETS[preset] | PRESETS[preset] if preset else SIZES
    config = Config(**(sizes | dict(dropout=0.0, condition_prob=0.0) | given))
    flm.check(config)
    config.device = str(flm.setup(config))
    print(f"torch {torch.__version__}, {config.device}, {torch.get_num_threads()} threads")
    print(f"V = {config.vocab_size}, D = {config.width}, {config.depth} blocks, "
          f"B = {config.batch_size}, L = {config.seq_len}")
    table = TABLES[config.what](config)
    print("".join(f"{key:>14}" for key in table[0]))
    for row in table:
        name, *numbers = row.values()
        print(f"{name:>14}" + "".join(f"{x:14.6g}" for x in numbers))

if __name__ == "__main__":
    flm.run(main)
