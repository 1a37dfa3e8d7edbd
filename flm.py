"""Flow language model (FLM): text written all at once, by following a flow from Gaussian noise to one-hot tokens.

    python flm.py                                            # train on the embedded words, then write new ones
    python flm.py --dataset sotu                             # speeches in byte-pair tokens
    python flm.py --dataset my.txt --run-dir runs/mine       # any UTF-8 text, one document a line
    python flm.py --dataset lm1b                             # the paper's: downloads a billion words, for a GPU
    python flm.py --sample --run-dir runs/words --sample-steps 64 --num-samples 20
    python flm.py --sample --run-dir runs/words --infill con____ion   # or --prompt un: some of the text is given
    torchrun --standalone --nproc_per_node=8 flm.py --dataset my.txt

Paper: "One-step Language Modeling via Continuous Denoising", arXiv 2602.16813. t = 0 is noise and t = 1 is data, always.
B, L, V, D: rows, positions, vocabulary, width. What a GPT would not have is marked; runs, flags and files: run.py.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
import page
import prompts
import sources
from parallel import distribute, gradients, like, load_optimizer, reshard, to_save, unshard, whole
from run import (MISFITS, Log, clear, first_does, first_line, guard, lasting, open_folder, parse, picture, program, rank,
                 read_checkpoint, say, setting, setup, stop, total, unlocks, validate, world, write_checkpoint,
                 write_settings)
from sources import UserError

# ------------------------------------------------------------------------------------------------------ 1. The clock


def decodability(t: Tensor, V: int) -> Tensor:
    """tau(t) = (V P - 1) / (V - 1), P the probability that the argmax of a noisy one-hot at time t is right.

    P = E[Phi(z + t/(1-t))^(V-1)], z ~ N(0, 1): the right coordinate, in units of the noise z + t/(1-t), stands above V - 1
    others. The trapezoid rule on these nodes is exact to 1e-14. t: float64, in [0, 1). tau rises from 0, guessing, to 1.
    """
    z = torch.linspace(-12, 12, 401, dtype=torch.float64)
    log_phi = torch.special.log_ndtr(z + (t / (1 - t))[..., None])
    P = (torch.exp((V - 1) * log_phi - z**2 / 2) / math.sqrt(2 * math.pi)).sum(-1) * (z[1] - z[0])
    return (V * P - 1) / (V - 1)


class Clock(nn.Module):
    """[FLM] The decoding clock: time t as a function of tau, the chance, above guessing, that a noisy token is decodable.

    Uniform in t, most steps would pass where nothing or everything is decided; training and sampling are uniform in tau.
    A table over t, inverted by linear interpolation on the device that asks.
    """

    def __init__(self, V: int, nodes: int = 4096):
        super().__init__()
        t = torch.arange(nodes, dtype=torch.float64) / nodes
        tau = decodability(t, V).float()
        tau[0] = 0
        rising = tau > torch.cat([tau.new_tensor([-1.0]), tau.cummax(0).values[:-1]])  # tau saturates before t = 1
        rising &= tau < 1
        one = tau.new_ones(1)
        self.register_buffer("tau_nodes", torch.cat([tau[rising], one]), persistent=False)
        self.register_buffer("t_nodes", torch.cat([t[rising].float(), one]), persistent=False)

    def t(self, tau: Tensor) -> Tensor:
        """t(tau), float32, of any shape; t(0) = 0 and t(1) = 1 exactly."""
        return interpolate(tau, self.tau_nodes, self.t_nodes)

    def tau(self, t: Tensor) -> Tensor:
        """tau(t), the inverse of t(tau)."""
        return interpolate(t, self.t_nodes, self.tau_nodes)

    def slope(self, tau: Tensor) -> Tensor:
        """dt/dtau of the table, of the shape of tau."""
        i = segment(tau, self.tau_nodes)
        return (self.t_nodes[i] - self.t_nodes[i - 1]) / (self.tau_nodes[i] - self.tau_nodes[i - 1])


def segment(x: Tensor, nodes: Tensor) -> Tensor:
    """i such that nodes[i - 1] and nodes[i], of increasing nodes, are the ends of the segment x (any shape) lies in."""
    return torch.searchsorted(nodes, x.contiguous(), right=True).clamp(1, len(nodes) - 1)


def interpolate(x: Tensor, x_nodes: Tensor, y_nodes: Tensor) -> Tensor:
    """The piecewise linear function through increasing nodes, at x (any shape)."""
    i = segment(x, x_nodes)
    x0, x1, y0, y1 = x_nodes[i - 1], x_nodes[i], y_nodes[i - 1], y_nodes[i]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0))


# ------------------------------------------------------------------------------------ 2. Randomness, row by row


@dataclass(frozen=True)
class Rows:
    """Which rows of a global batch these are. All their randomness is a pure function of (seed, step, row), so that any
    number of processes and micro-batches sees the same batch, and resuming needs no state.

    `index` are their numbers among the `total` rows of the batch; training steps count from 0, negative ones are for
    samples and evaluations. tau fixes the time of all rows; None draws it, stratified over the batch.
    """

    seed: int
    step: int
    index: range
    total: int
    tau: float | None = None

    def draw(self, L: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """tau (B,) and white noise (B, L, dims), float32."""
        generator = torch.Generator(device)
        white = torch.empty(len(self.index), L, dims, device=device)
        for noise, row in zip(white, self.index):
            noise.normal_(generator=generator.manual_seed(mix(self.seed, self.step, row)))
        if self.tau is not None:
            return torch.full((len(white),), self.tau, device=device), white
        # [FLM] times are stratified over the batch: one draw in each of `total` equal strata of tau
        tau = [(row + mix(self.seed, self.step, row, 1) / 2**32) / self.total for row in self.index]
        return send(torch.tensor(tau), device), white

    def known(self, tokens: Tensor, prob: float, end: int | None) -> Tensor:
        """What rows are told of their texts in training, with probability `prob`: tokens (B, L), -1 where unknown.

        A prefix, all but a span, or tokens here and there: a third each, of random size, never the whole. Of padded rows,
        `end` being their end token, a prefix does not reach it and the other two know the padding: how long the text is.
        """
        L, generator = tokens.shape[1], torch.Generator()
        u = torch.stack([torch.rand(L + 5, generator=generator.manual_seed(mix(self.seed, self.step, row, 2)))
                         for row in self.index])
        u = send(u, tokens.device)
        whether, kind, a, b, c = u[:, :5, None].unbind(1)  # (B, 1) each
        place = torch.arange(L, device=tokens.device)
        length = L if end is None else ((tokens == end).cumsum(1) == 0).sum(1, keepdim=True) + 1  # with the end token
        first, last = (torch.minimum(a, b) * length).floor(), (torch.maximum(a, b) * length).floor()  # of the span
        prefix = place < a * (length - 1)  # shorter than the text
        behind = place <= last + c * (L - last) if end is None else True  # packed text may go on, unknown
        outside = (place < first) | (place > last) & behind
        each = torch.where(place < length, u[:, 5:], -1.0)  # with chance a each, padding always, but
        scattered = each < torch.minimum(a, each.amax(1, keepdim=True))  # never all: the largest stays unknown
        chosen = torch.where(kind < 1 / 3, prefix, torch.where(kind < 2 / 3, outside, scattered))
        return torch.where(chosen & (whether < prob), tokens, -1)

    def fresh(self, step: int) -> "Rows":
        """The same rows with other randomness: that of a sampler's step."""
        return replace(self, seed=mix(self.seed, 3, step))


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def mix(*numbers: int) -> int:
    """Hashes integers to a 32-bit seed (a CPU generator reads no more); each round is murmur3's finaliser."""
    h = len(numbers)
    for number in numbers:
        h = (h ^ number ^ (number >> 32) * 0x85EBCA6B) * 0x9E3779B1 & 0xFFFFFFFF  # below 0, number >> 32 is -1
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        h ^= h >> 16
    return h


# ------------------------------------------------------------------------------------------- 3. Loss and sampler


def flow_loss(model: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """[FLM] The loss, all of it: cross-entropy of the denoiser against the clean token, at a random time.

    tokens (B, L) -> loss (B,) in nats a position, tau (B,). What a row is told of its tokens counts 0.
    """
    tau, white = rows.draw(tokens.shape[1], model.noise_dims, tokens.device)
    t = model.clock.t(tau)[:, None, None]
    state = model.noise(white).lerp_(model.clean(tokens), t)  # x_t = (1 - t) x0 + t x1, in the place of x0
    nats = model(state, tau, known=model.told(tokens, rows), targets=tokens)  # F.cross_entropy(logits, tokens): (B, L)
    return nats.mean(1), tau


def euler(denoiser: Callable[[Tensor, Tensor, Tensor], Tensor], state: Tensor, clock: Clock, steps: int,
          clean: Callable[[Tensor], Tensor] = lambda probs: probs, share: Callable[[Tensor, Tensor], Tensor] | None = None,
          noise: Callable[[int], Tensor] | None = None, see: Callable[[Tensor, Tensor, Tensor], None] | None = None
          ) -> Tensor:
    """[FLM] The sampler: from noise, t = 0, to data, t = 1, in Euler steps that are uniform in tau.

    denoiser(state, tau_s (B,), tau_t (B,)) -> probs (B, L, V): for a flow D_s, the expectation of the clean one-hots,
    whatever tau_t is; for a flow map delta_{s,t}, whose steps are exact. `clean` maps probs to the space of the state.

    With r = share(t, t'), up to 1, a step goes on to a later t~ and, scaled, back to t', where the old noise then has
    sqrt(1 - r^2) of its size, and fresh noise(step) has r. The law of x_t' stays if the step to t~ was exact: with a map for
    every r (the paper's "gamma-sampling" keeps it at 0 and 1 only), with Euler steps in the limit of many, if r falls with
    their length.

    Returns the last probs, whose argmax is the text. see(tau, state, probs) is told what each evaluation saw and said.
    """
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    ts = clock.t(taus)
    for step in range(steps):
        tau, t, t_next = taus[step], ts[step], ts[step + 1]
        r = share(t, t_next) if share and step + 1 < steps else 0
        t_far = t_next / (t_next + (1 - t_next) * (1 - r**2) ** 0.5) if share else t_next  # t~
        probs = denoiser(state, tau.expand(len(state)), clock.tau(t_far).expand(len(state)))
        if see:
            see(tau, state, probs)
        if step + 1 == steps:
            return probs  # the last step, t' = 1, lands on clean(probs) itself
        state = state + (t_far - t) / (1 - t) * (clean(probs) - state)  # velocity b_t = (D_t - x) / (1 - t)
        if share:
            state = t_next / t_far * state + r * (1 - t_next) * noise(step)


def sample(model: nn.Module, n: int, steps: int, seed: int, churn: float = 0.0, guidance: float = 0.0,
           known: Tensor | None = None, see: Callable | None = None) -> Tensor:
    """[FLM] Writes n texts, all positions at once, in `steps` network evaluations: tokens (n, L).

    Text i is a pure function of the settings, the seed, i and what is `known` of it: tokens (L,) or (n, L), -1 where there
    is none.

    With churn > 0 steps take fresh noise and forget errors of earlier ones. For guidance see guided; `see` is euler's.
    """
    logits = guided(model, guidance)

    def solve(rows: Rows, known: Tensor | None) -> Tensor:
        def denoiser(state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
            return logits(state, tau_s, known=known).softmax(-1)
        return euler(denoiser, start(model, rows), model.clock, steps, model.clean, diffusion(churn) if churn else None,
                     lambda step: start(model, rows.fresh(step)), see).argmax(-1)
    return write(model, n, seed, solve, known)


def guided(model: nn.Module, w: float) -> Callable[..., Tensor]:
    """The logits (B, L, V) of a flow in which what context adds to Bayes' rule for each token counts 1 + w (1 - tau) times.

    Guidance away from a weaker model (Karras et al. 2024), here the exact one that sees no context, as long as there is
    something to decide: in the end both are certain, and a network's certainty is bounded. Called as the model is, without a
    second time.
    """
    if not w:
        return model
    bayes = model.context_free()

    def logits(state: Tensor, tau: Tensor, known: Tensor | None = None) -> Tensor:
        z = model(state, tau, known=known)
        more = w * (1 - tau[:, None, None])
        return torch.where(z.isinf(), z, z + more * (z - bayes(state, tau)))  # what is known is certain
    return logits


def diffusion(churn: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The share of fresh noise, r^2 = 1 - (SNR / SNR')^churn of the variance with SNR = t^2/(1-t)^2, that makes Euler steps
    those of a diffusion with the flow's laws (Song et al. 2021); churn 1 is the ancestral sampler's."""
    return lambda t, t_next: (1 - (t * (1 - t_next) / ((1 - t) * t_next)) ** (2 * churn)).clamp(min=0).sqrt()


def start(model: nn.Module, rows: Rows) -> Tensor:
    """The states at t = 0 from which these rows are written."""
    return model.noise(rows.draw(model.config.seq_len, model.noise_dims, model.device)[1])


@torch.no_grad()
def write(model: nn.Module, n: int, seed: int, solve: Callable[[Rows, Tensor | None], Tensor],
          known: Tensor | None = None) -> Tensor:
    """n texts (n, L) from solve(rows, known (B, L) or None) -> tokens (B, L), as many at once as memory allows."""
    batch, texts = rows_at_once(model), []
    if known is not None:
        known = known.expand(n, -1).to(model.device)
    for i in range(0, n, batch):
        rows = Rows(seed, -1, range(i, min(i + batch, n)), n)  # step -1: no training step's noise
        texts.append(solve(rows, None if known is None else known[i : i + batch]).cpu())
    return torch.cat(texts)


def rows_at_once(model: nn.Module) -> int:
    """As many rows, of 32768 tokens at most, as keep a float32 (rows, L, V) tensor within 1 GiB, on a GPU within a twelfth
    of its memory."""
    room = torch.cuda.get_device_properties(model.device).total_memory // 12 if model.device.type == "cuda" else 2**30
    L = model.config.seq_len
    return max(1, min(2**15 // L, room // (4 * L * model.V)))


# ---------------------------------------------------------------------------------------------- 4. The transformer


class TimeEmbedding(nn.Module):
    """[FLM] A GPT has no clock. tau (B,) -> (B, width): sinusoids of tau * scale, then a two-layer network."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", scale * 10000 ** -(torch.arange(128) / 128), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tau: Tensor) -> Tensor:
        angles = tau[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split: x (B, L, n, heads, 2k), cos and sin (L, 1, 1, k)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, cap: float, causal: bool = False) -> Tensor:
    """Attention over (B, heads, L, head width), scores soft-capped at `cap` if it is not 0; causal: none looks ahead, the
    last query standing at the last key.

    Fused where that is faster: not on short rows on a CPU, nor with a cap.
    """
    if not cap and (q.is_cuda or q.shape[-2] > 64):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[-2] == k.shape[-2])
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[-2] - q.shape[-2])
        scores = scores.masked_fill(ahead, -math.inf)
    return scores.softmax(-1) @ v


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in the precision of the weight: float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight)


class Block(nn.Module):
    """Attention and MLP; the time shifts, scales and gates both (adaLN). [FLM] not causal: all positions at once."""

    def __init__(self, config: "Config", causal: bool):
        super().__init__()
        D, self.causal = config.width, causal
        self.heads, self.cap, self.dropout = config.heads, config.attention_cap, config.dropout
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.modulation = nn.Linear(config.cond_width, 6 * D)

    def forward(self, x: Tensor, cond: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x (B, L, D), cond (B, C) -> (B, L, D). past, for a causal block: [] or [keys and values of the positions before],
        to which those of x are added."""
        B, L, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].to(x.dtype).chunk(6, dim=-1)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        qkv = self.qkv(h).view(B, L, 3, self.heads, D // self.heads)
        (q, k), v = rotate(qkv[:, :, :2], cos, sin).to(qkv.dtype).unbind(2), qkv[:, :, 2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            past[:] = [torch.cat([*past, torch.stack([k, v])], dim=-2)]
            k, v = past[0]
        h = attention(q, k, v, self.cap, self.causal)
        h = self.out(h.transpose(1, 2).reshape(B, L, D))
        x = torch.addcmul(x, gate1, F.dropout(h, self.dropout, self.training).to(x.dtype))
        h = self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return torch.addcmul(x, gate2, F.dropout(h, self.dropout, self.training).to(x.dtype))


class Transformer(nn.Module):
    """[FLM] The network owns its state space: how noise and tokens become states, and how a state is read.

    Two parameterisations of the same flow, `config.parameterization`:

    linear (the paper's): the state is x_t E, with E (V, D) the input embedding. Noise drawn in D dimensions from
    N(0, E^T E) has the law of eps E and every sampler step is linear in x_t, so nothing is ever V-dimensional but logits.

    posterior (ours): the state is x_t in R^V. The network reads the embedding of what Bayes' rule alone knows of each
    token, softmax(log p + c x_t), c = t/(1-t)^2, adds log p + c x_t to its logits, and learns only what context adds.

    `kind` is the model it serves: flm, fmlm or, in baselines.py, ar (causal) and mdlm (masked). Those two read embeddings,
    and the vector `blank` in place of a token: before the first and at a mask. `posterior` adds `blank`, or a learned
    position, to every reading: else layer norm makes an unsure token, whose mean embedding is short, as loud as a sure one.

    Tokens that are given are read as their embedding and the vector `mark`, if the network learns prompts (condition_prob).
    """

    def __init__(self, config: "Config", V: int, log_p: Tensor, kind: str = "flm"):
        super().__init__()
        D, self.kind = config.width, kind
        self.config, self.V, self.linear = config, V, config.parameterization == "linear"
        self.noise_dims = D if self.linear and V > D else V
        self.clock = Clock(V)
        self.register_buffer("log_p", log_p.float(), persistent=False)
        self.kept_factor = None, None
        self.embedding = nn.Parameter(torch.empty(V, D).uniform_(-1, 1) / math.sqrt(D))  # E
        learned = not config.packing if config.position_embedding is None else config.position_embedding
        self.position = nn.Parameter(torch.zeros(config.seq_len, D)) if learned else None
        self.time_s = TimeEmbedding(config.cond_width, config.time_scale)
        self.time_t = TimeEmbedding(config.cond_width, config.time_scale)  # the second time, of the flow map
        self.blocks = nn.ModuleList(Block(config, kind == "ar") for _ in range(config.depth))
        self.norm = LayerNorm(D)
        self.modulation = nn.Linear(config.cond_width, 2 * D)
        self.head = nn.Linear(D, V)
        blank = kind in ("ar", "mdlm") or not (self.linear or learned)
        self.blank = nn.Parameter(torch.zeros(D)) if blank else None
        self.gain = None if self.linear else nn.Parameter(torch.zeros(config.cond_width))  # of a map on its state
        marked = config.condition_prob > 0 and kind not in ("ar", "mdlm")
        self.mark = nn.Parameter(torch.zeros(D)) if marked else None  # of known tokens
        angles = torch.arange(config.seq_len)[:, None, None, None] * 10000 ** -(
            torch.arange(0, D // config.heads, 2) / (D // config.heads))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """The paper's start: gates and output at zero, so that every block is the identity and all tokens are as likely.

        For `posterior` that is a saddle, Bayes' rule being optimal without context, and for mdlm, as a mask tells nothing.
        There, and for ar, which learns faster so, the output is small instead, gates start at 1, and blocks are the identity
        by their last matrices; embeddings have the size of what blocks will add.
        """
        for layer in [*(block.modulation for block in self.blocks), self.modulation, self.time_t.mlp[-1], self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.time_t.requires_grad_(False)  # a flow has no second time: distillation thaws what is its own
        if self.gain is not None:
            self.gain.requires_grad_(False)
        if self.blank is not None:
            nn.init.normal_(self.blank, std=0.6)
        if self.blank is not None or not self.linear:
            nn.init.normal_(self.head.weight, std=0.1)
            nn.init.normal_(self.embedding, std=0.6)
            for block in self.blocks:
                nn.init.zeros_(block.out.weight)
                nn.init.zeros_(block.mlp[2].weight)
                block.modulation.bias.data.view(6, -1)[[2, 5]] = 1  # the gates

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def noise(self, white: Tensor) -> Tensor:
        """[FLM] The state at t = 0 from white noise (B, L, noise_dims): eps E or, alike in law, z chol(E^T E)^T."""
        if not self.linear:
            return white
        if self.V <= self.config.width:  # E^T E is singular
            return white @ self.embedding
        return white @ self.factor().T

    def factor(self) -> Tensor:
        """chol(E^T E) (D, D), for V > D; NaN where there is none. Without gradients it is kept while E stays as it is."""
        version = (self.embedding.data_ptr(), self.embedding._version)
        if not torch.is_grad_enabled() and self.kept_factor[0] == version:
            return self.kept_factor[1]
        gram = self.embedding.T @ self.embedding.detach()
        gram = 2 * gram - gram.detach()  # half the backward of E^T E, twice: Cholesky's gradient is symmetric
        factor, failed = torch.linalg.cholesky_ex(gram)  # with its gradient: without, that of E is biased
        factor = torch.where(failed == 0, factor, math.nan)  # no waiting for `failed`: a NaN loss stops the run
        if not torch.is_grad_enabled():
            self.kept_factor = version, factor
        return factor

    def clean(self, tokens_or_probs: Tensor) -> Tensor:
        """[FLM] The state at t = 1 of tokens (B, L), or its expectation under probs (B, L, V)."""
        if tokens_or_probs.is_floating_point():
            return tokens_or_probs @ self.embedding if self.linear else tokens_or_probs
        if self.linear:
            return F.embedding(tokens_or_probs, self.embedding)
        zeros = torch.zeros(*tokens_or_probs.shape, self.V, dtype=self.embedding.dtype, device=self.device)
        return zeros.scatter_(-1, tokens_or_probs[..., None], 1.0)

    def told(self, tokens: Tensor, rows: Rows) -> Tensor | None:
        """What the rows of a training batch are told of their tokens: (B, L), -1 where unknown; None if nothing is."""
        if self.mark is None or not self.training:
            return None
        return rows.known(tokens, self.config.condition_prob, None if self.config.packing else self.tokenizer.end)

    def bayes_weight(self, tau_s: Tensor, tau_t: Tensor | None = None) -> Tensor:
        """[FLM] c (B, 1, 1): Bayes' rule for each token without its context is log p + c x_s, up to a constant.

        A map from s to t must see noise that c hides. At m, half-way in tau, noise (1-m) eps will weigh m/(1-m)^2 in Bayes'
        rule; on x_s, whose noise is (1-s) eps, that is k = m/((1-m)(1-s)), which is c where t = s. By .98 all is decided.
        """
        s = self.clock.t(tau_s)[:, None, None]
        m = s if tau_t is None else self.clock.t((tau_s + tau_t) / 2)[:, None, None]
        return m / ((1 - m).clamp(min=0.02) * (1 - s).clamp(min=0.02))

    def forward(self, state: Tensor, tau_s: Tensor, tau_t: Tensor | None = None, known: Tensor | None = None,
                targets: Tensor | None = None, past: list[list[Tensor]] | None = None) -> Tensor:
        """Logits (B, L, V) in float32 from state (B, L, D or V) and tau_s (B,), or with targets (B, L) or (B, L, V)
        their cross-entropy (B, L). With tau_t (B,) those of a flow map's mean denoiser from s to t, without it the flow's
        denoiser at s. past: for ar, what each block keeps of the positions before these.

        known (B, L) are given tokens, -1 where there is none: a network with a `mark` for them reads them, whatever the
        state is there; one without sees the state. Either gives them for certain: a sampler's state goes straight to them.

        With targets, what is V-dimensional but the state is held for `config.loss_chunk` positions at a time."""
        chunk = self.config.loss_chunk if targets is not None else 0
        cond = F.silu(self.time_s(tau_s) if tau_t is None else self.time_s(tau_s) + self.time_t(tau_t))
        read = weight = None
        if not self.linear:
            read = weight = self.bayes_weight(tau_s, tau_t)
            if tau_t is not None:  # [FLM] to a map noise is information, the more the longer its journey
                weight = read + ((tau_t - tau_s) * (cond @ self.gain))[:, None, None]
        with torch.autocast(state.device.type, torch.bfloat16, enabled=bool(self.config.bf16)):
            # [FLM] read the state: as it is (x_t E), or as the mean embedding of what Bayes' rule makes of each token
            x = state if self.linear else in_chunks(self.mean_embedding, chunk, state, read)
            if known is not None and self.mark is not None:  # [FLM] given tokens are read as they are, and marked
                x = torch.where((known < 0)[..., None], x, F.embedding(known.clamp(min=0), self.embedding) + self.mark)
            if not self.linear and self.blank is not None:
                x = x + self.blank
            before = past[0][0].shape[-2] if past and past[0] else 0
            here = slice(before, before + x.shape[1])
            if self.position is not None:
                x = x + self.position[here]
            x = x.to(self.embedding.dtype)  # the residual stream stays in float32
            for i, block in enumerate(self.blocks):
                x = block(x, cond, self.cos[here], self.sin[here], past and past[i])
            shift, scale = self.modulation(cond)[:, None].to(x.dtype).chunk(2, dim=-1)
            x = torch.addcmul(shift, self.norm(x), 1 + scale)
        state = None if self.linear else state
        if targets is None:
            z = self.logits(x, state, weight)
            return z if known is None else self.insist(z, known)
        nats = in_chunks(self.cross_entropy, chunk, x, state, weight, targets)
        return nats if known is None else nats * (known < 0)

    def context_free(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What Bayes' rule says of each token from its own state alone, exactly: f(state, tau (B,)) -> logits (B, L, V)."""
        if not self.linear:
            return lambda state, tau: torch.addcmul(self.log_p, self.bayes_weight(tau), state)
        E = self.embedding.detach().double()
        dual = E @ torch.linalg.pinv(E.T @ E, hermitian=True)  # x_t E is N(t E[v], (1-t)^2 E^T E) if v is the token
        half, dual = ((dual * E).sum(1) / 2).to(self.log_p), dual.to(self.embedding)

        def logits(state: Tensor, tau: Tensor) -> Tensor:
            t = self.clock.t(tau)[:, None, None]
            return self.log_p + self.bayes_weight(tau) * (state @ dual.T - t * half)
        return logits

    def mean_embedding(self, state: Tensor, weight: Tensor) -> Tensor:
        """What Bayes' rule expects each token's embedding to be: (..., D)."""
        return aligned(torch.addcmul(self.log_p, weight, state).softmax(-1), -1) @ aligned(self.embedding, -2)

    def logits(self, x: Tensor, state: Tensor | None, weight: Tensor | None) -> Tensor:
        """Features x (..., D) and, for `posterior`, the state (..., V) and its weight in Bayes' rule -> logits (..., V)."""
        cap = self.config.logit_cap
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bool(self.config.bf16)):
            scale = 2 / cap if cap else 1
            z = F.linear(scale * x, aligned(self.head.weight, -2), scale * aligned(self.head.bias, -1))
        z = z[..., : self.V].to(x.dtype)
        if cap:
            z = 2 * cap * z.sigmoid_() - cap  # = cap tanh(network / cap), but a sigmoid takes a CPU a quarter of the time
        if state is None:
            return z
        return torch.addcmul(z + self.log_p, weight, state)  # [FLM] no cap on Bayes' part, which reaches thousands

    def insist(self, z: Tensor, known: Tensor) -> Tensor:
        """Logits (B, L, V) of certainty where tokens are known."""
        sure = torch.full_like(z, -math.inf).scatter_(-1, known.clamp(min=0)[..., None], 0.0)
        return torch.where((known < 0)[..., None], z, sure)

    def cross_entropy(self, x: Tensor, state: Tensor | None, weight: Tensor | None, targets: Tensor) -> Tensor:
        """x (..., D), state (..., V) and its weight or None, targets (...) or (..., V) -> nats (...)."""
        z = self.logits(x, state, weight).flatten(0, -2)
        targets = targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
        return F.cross_entropy(z, targets, reduction="none").view(x.shape[:-1])


def aligned(x: Tensor, dim: int) -> Tensor:
    """x with, on a GPU, zeros behind dimension `dim` < 0 up to a multiple of 64: V = 50304 is faster than 50258."""
    missing = -x.shape[dim] % 64 if x.is_cuda else 0
    return F.pad(x, [0, 0] * (-1 - dim) + [0, missing]) if missing else x


def in_chunks(f: Callable, chunk: int, *tensors: Tensor | None) -> Tensor:
    """f of (B, L, ...) tensors, some of which may be (B, 1, 1) or None, `chunk` positions at a time, computed again for
    their gradients instead of kept; 0: all at once."""
    B, L = tensors[0].shape[:2]
    if not chunk or chunk >= B * L:
        return f(*tensors)
    flat = [x if x is None else x.expand(-1, L, *x.shape[2:]).flatten(0, 1).split(chunk) for x in tensors]
    parts = zip(*(itertools.repeat(None) if x is None else x for x in flat))
    return torch.cat([checkpoint(f, *part, use_reentrant=False) for part in parts]).unflatten(0, (B, L))


# ---------------------------------------------------------------------------------------------------- 5. Settings


@dataclass
class Network:
    """The settings that a network keeps for life: its text and its shape."""

    dataset: str = setting("words", "words, sotu, lm1b, owt, or a UTF-8 text with one document a line (.txt, .txt.gz, "
                           ".txt.xz)")
    data_dir: str = setting("", "lm1b's tarball, or a folder with its files, or with owt's as parquet or text; left out: "
                            "downloaded")
    tokenizer: str = setting("bert-base-uncased", "how text becomes tokens", choices=data.TOKENIZERS)
    vocab_size: int = setting(4096, "size of the bpe vocabulary, end token included", 2, 2**20)
    seq_len: int = setting(128, "positions in a sequence (L)", 1, 2**20)
    packing: bool = setting(True, "join documents and cut blocks of L, instead of one padded document a row")

    parameterization: str = setting("linear", "how the network reads its state", choices=("linear", "posterior"))
    depth: int = setting(12, "blocks", 0, 2**10)
    width: int = setting(768, "D", 2, 2**16)
    heads: int = setting(12, "attention heads", 1, 2**12)
    cond_width: int = setting(128, "width of the time embedding", 1, 2**16)
    dropout: float = setting(0.1, "on the residual branches", 0, 1)
    condition_prob: float = setting(0.0, "share of training rows that are told some of their tokens, for --prompt and "
                                    "--infill", 0, 1)
    time_scale: float = setting(1.0, "factor on tau before its sinusoids", 0)
    position_embedding: bool | None = setting(None, "learned positions, zero at first, beside the rotary ones, which do not "
                                              "tell where a row begins; left out: where rows are padded")
    logit_cap: float = setting(30.0, "soft cap on the network's output; 0: none", 0)
    attention_cap: float = setting(0.0, "soft cap on attention scores; 0: none", 0)


@dataclass
class Config(Network):
    """All settings; each field is a flag. The defaults are the paper's network and training, PRESETS change them."""

    max_steps: int = setting(1_000_000, "steps of training", 1)
    batch_size: int = setting(512, "rows a step, over all processes and micro-batches", 1, 2**20)
    micro_batch_size: int = setting(0, "rows a process holds at once; 0: at most 32768 tokens, and 1 GiB or a twelfth of a "
                                   "GPU's memory for their logits", 0)
    optimizer: str = setting("adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest",
                             choices=("adamw", "muon"))
    lr: float = setting(3e-4, "learning rate", 0)
    beta2: float = setting(0.999, "AdamW's second beta", 0, 1)
    warmup: int = setting(2500, "steps of linear warm-up", 0)
    decay: float = setting(0.0, "last share of the steps in which the learning rate falls linearly to 0", 0, 1)
    clip: float = setting(1.0, "largest gradient norm; 0: no bound", 0)
    ema: float = setting(0.9999, "decay of the average weights, which are what is evaluated", 0, 1)
    bf16: bool | None = setting(None, "bfloat16 in the linear layers; left out: where it is faster")
    compile: bool = setting(True, "torch.compile on CUDA")
    shard: bool = setting(False, "split parameters, gradients, averages and optimizer over the processes (FSDP)")
    loss_chunk: int = setting(0, "positions whose logits are held at once, and computed again for their gradients; 0: "
                            "all", 0)
    seed: int = setting(0, "of weights, data order, times and noise; of the noise with --sample", 0, 2**62)

    skip_bad_steps: int = setting(0, "steps whose loss or gradient is not a number to pass over before giving up", 0)
    log_every: int = setting(100, "steps from one log line to the next", 1)
    eval_every: int = setting(5000, "steps from one held-out loss, samples and checkpoint to the next", 1)
    eval_rows: int = setting(1024, "held-out rows of an evaluation during training; the last one takes them all", 1)

    data_url: str = setting("", "where to download lm1b from; left out: its own site")
    run_dir: str = setting("", "folder of the run; left out: runs/DATASET")
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = setting(0, "CPU threads a process; 0: torch's choice", 0, 2**10)
    resume: bool = setting(False, "go on with the run in the folder")
    overwrite: bool = setting(False, "train anew in a folder that holds a run")
    stop_after: int = setting(0, "stop and save after this step, as if interrupted; 0: go to the end", 0)
    sample: bool = setting(False, "write samples of a trained model, one a line, instead of training")
    sample_steps: int = setting(64, "network evaluations for a text", 1, 2**20)
    churn: float = setting(0.0, "fresh noise in the steps of --sample: 0, the flow itself; 1, as ancestral sampling", 0)
    guidance: float = setting(0.0, "w in --sample: what context adds counts 1 + w times at first, once in the end; 0, the "
                              "flow itself", 0)
    num_samples: int = setting(16, "texts to write", 1, 2**24)
    prompt: str = setting("", "how the texts of --sample begin")
    infill: str = setting("", "a text with gaps for --sample to fill, con____ion or, of word pieces, the [MASK:2] of")
    mask_char: str = setting("_", "character that stands for an unknown one in --infill")
    out: str = setting("", "file for the samples; left out: standard output")
    html: str = setting("", "file for a page on which the texts of --sample denoise")


SMALL = dict(cond_width=64, dropout=0.0, time_scale=100.0, optimizer="muon", lr=5e-3, decay=1.0, warmup=100, ema=0.99,
             log_every=20)
PRESETS = {
    "words": SMALL | dict(tokenizer="chars", seq_len=16, packing=False, parameterization="posterior", depth=4, width=96,
                          heads=3, condition_prob=0.1, lr=6e-3, max_steps=1600, batch_size=128, eval_every=400,
                          eval_rows=256),
    "sotu": SMALL | dict(tokenizer="bpe", vocab_size=4096, seq_len=64, depth=4, width=128, heads=4, lr=1e-2, max_steps=2000,
                         batch_size=32, eval_every=500, eval_rows=64),
    "lm1b": {},  # the paper's network and training, which are the defaults above
    "owt": dict(tokenizer="gpt2", seq_len=1024),
}
PRESETS["a text file"] = SMALL | dict(tokenizer="bpe", vocab_size=1024, seq_len=32, parameterization="posterior", depth=4,
                                      width=128, heads=4, lr=8e-3, max_steps=1500, batch_size=64, eval_every=500,
                                      eval_rows=128)  # a short text has no 4096 tokens


def check(config: Config) -> None:
    """Raises UserError for settings that do not go together."""
    local, micro = config.batch_size // world(), config.micro_batch_size
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width}: must be a multiple of twice --heads {config.heads}")
    if config.batch_size % world():
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {world()} processes")
    if micro and local % micro:
        raise UserError(f"--micro-batch-size {micro}: must divide the {local} rows of a process")


# ------------------------------------------------------------------------------------------------------ 6. Training


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in float32, since torch's bfloat16 is ten times slower on a CPU
    that has no instructions for it; and a parameter may be several matrices, `stacked` by rows.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, stacked: int = 1):
        super().__init__(params, dict(lr=lr, momentum=momentum, stacked=stacked))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov: the gradient, moved on to the new average
                update = whole(p.grad.lerp(state["momentum"], group["momentum"])).view(group["stacked"], -1, p.shape[1])
                scale = 0.2 * math.sqrt(max(update.shape[1:]))
                p.add_(like(orthogonalise(update).view(p.shape), p), alpha=-scale * group["lr"])


def orthogonalise(G: Tensor) -> Tensor:
    """Roughly U W^T of each G = U S W^T in (n, rows, columns): Newton-Schulz brings all singular values near 1."""
    X = G.mT if G.shape[1] > G.shape[2] else G
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.mT if G.shape[1] > G.shape[2] else X


def bf16_is_faster(device: torch.device) -> bool:
    """Whether a linear layer takes less than half the time in bfloat16 (on a CPU, AMX decides)."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, runs = torch.ones(512, 128, dtype=dtype), []
        for _ in range(12):
            start = time.perf_counter()
            F.linear(x, x)
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)  # another process may be at work as well
    return 2 * seconds[torch.bfloat16] < seconds[torch.float32]


def make_optimizers(model: Transformer, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW for all that learns, or Muon for the matrices of the blocks and AdamW for the rest."""
    qkv = [block.qkv.weight for block in model.blocks]
    matrices = [layer.weight for block in model.blocks for layer in (block.out, block.mlp[0], block.mlp[2])]
    taken = {id(p) for p in qkv + matrices} if config.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, config.beta2), weight_decay=0, fused=True)
    if not taken:
        return [adamw]
    return [adamw, Muon([dict(params=qkv, stacked=3), dict(params=matrices)], config.lr)]


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, constant, and a linear fall to 0 over the last `decay` of the steps."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    fall = min(1.0, (config.max_steps - step) / (config.decay * config.max_steps)) if config.decay else 1.0
    return config.lr * min(rise, fall)


class Objective(nn.Module):
    """The loss as a module, so that all of it runs inside DistributedDataParallel."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.loss(self.model, tokens, rows)


class Meter:
    """Losses and gradient norms of training steps, kept on the device until they are read: only that waits for it."""

    def __init__(self, device: torch.device, skip: int):
        self.device, self.skip, self.skipped, self.least = device, skip, 0, math.inf
        self.clear()

    def clear(self) -> None:
        self.steps, self.bins, self.since = [], torch.zeros(2, 10, device=self.device), time.perf_counter()

    def rows(self, nll: Tensor, tau: Tensor) -> None:
        """Losses and times (B,), summed by tenth of tau."""
        finite = nll.isfinite()
        self.bins.index_add_(1, (tau * 10).long().clamp(max=9), torch.stack([nll.where(finite, 0), finite.to(nll)]))

    def step(self, loss: Tensor, norm: Tensor) -> None:
        self.steps.append(torch.stack([loss, norm]))

    def read(self, done: int, scale: float, kept: str) -> dict:
        """What the steps since the last reading, up to `done`, have come to, for the log. Raises UserError, which says what
        was `kept`, if more than `skip` steps were not a number, or the loss has exploded from its least: `scale` is that of
        a model that knows nothing."""
        values, (sums, counts) = (total(torch.stack(self.steps)) / world()).tolist(), total(self.bins).tolist()
        good = [pair for pair in values if all(map(math.isfinite, pair))]
        self.skipped += len(values) - len(good)
        if self.skipped > self.skip:
            bad = next(i for i, pair in enumerate(values, start=done - len(values)) if pair not in good)
            raise UserError(f"the loss of step {bad} or its gradient is not a number; {kept}; try a smaller --lr, or "
                            f"--resume --skip-bad-steps {10 + self.skip}")
        loss = sum(nats for nats, _ in good) / len(good) if good else None
        if good and loss > 10 * abs(self.least) + scale:  # far beyond what noise does
            raise UserError(f"the loss has exploded, from {self.least:.3g} to {loss:.3g} in the steps before {done}; "
                            f"{kept}; try a smaller --lr")
        self.least = min(self.least, loss if good else math.inf)
        line = dict(loss=loss, grad_norm=good[-1][1] if good else None, skipped=self.skipped,
                    loss_by_tau=[s / c if c else None for s, c in zip(sums, counts)],
                    steps_per_s=len(values) / (time.perf_counter() - self.since))
        self.clear()
        return line


@contextlib.contextmanager
def weights(objective: Objective, values: list[Tensor]) -> Iterator[None]:
    """The model of an objective with other weights for a while, in evaluation mode."""
    params = list(objective.model.parameters())
    own = [p.detach().clone() for p in params]
    overwrite(params, values)
    unshard(objective.eval())
    yield
    reshard(objective.train())
    overwrite(params, own)


def shaped_alike(values: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    if [x.shape for x in values] != [p.shape for p in params]:
        raise ValueError("its weights have other shapes")


@torch.no_grad()
def overwrite(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)  # in place: a sharded one is not to be replaced


@torch.no_grad()
def held_out_loss(model: nn.Module, loss: Callable, corpus: data.Corpus, rows: int, seed: int = 0) -> list[float]:
    """Mean loss on the first `rows` held-out rows at the middle of each tenth of tau, shared out over the processes."""
    n, batch = min(rows, corpus.blocks("heldout")), rows_at_once(model)
    sums = torch.zeros(10, device=model.device)
    for k in range(10):
        for i in range(rank() * batch, n + rank() * batch, world() * batch):
            index = range(i, min(i + batch, n)) or range(1)  # a process without rows keeps step with the others
            tokens = corpus.batch("heldout", 0, index).to(model.device)
            nll = loss(model, tokens, Rows(seed, -2 - k, index, n, tau=(k + 0.5) / 10))[0].sum()
            sums[k] += nll * (i < n)
    return (total(sums) / n).tolist()


def saved_before(path: Path, corpus: data.Corpus, config: Config) -> dict | None:
    """What a run has to go on with, None if it was cut off before its first save. Raises UserError if that does not fit."""
    if not (path.exists() or path.with_suffix(".prev.pt").exists()):
        return None
    saved = read_checkpoint(path)
    if not saved["source"]:
        raise UserError(f"{path}: was converted, without what its optimizer needs to go on; distil it, or train anew in "
                        "another --run-dir")
    if (saved["source"], saved["tokenizer"]) != (corpus.meta["source"], corpus.tokenizer.checksum):
        raise UserError(f"{path}: --dataset {config.dataset} is not the text that this run was begun with")
    return saved


def train(model: Transformer, loss: Callable, corpus: data.Corpus, config: Config, kind: str, sample: Callable) -> None:
    """The one training loop: fits `loss(model, tokens, rows) -> (loss (B,), tau (B,))` and leaves K.pt, K.prev.pt,
    K.log.jsonl, K.samples.txt and, at the end, K.loss.png in the run folder, K being `kind`. The model is left with its
    average weights. sample(model, n, steps, seed) -> tokens (n, L) shows progress.

    Raises UserError, and saves nothing more, if the loss explodes or stops being a number, and KeyboardInterrupt, once the
    step is done and saved, if a signal came.
    """
    from tqdm import tqdm

    path, device = Path(config.run_dir, f"{kind}.pt"), model.device
    saved = saved_before(path, corpus, config) if config.resume else None
    if config.compile and device.type == "cuda":
        if config.shard:  # part by part, as they are gathered
            for part in (*model.blocks, model.norm):
                part.compile()
            model.cross_entropy, model.mean_embedding = map(torch.compile, (model.cross_entropy, model.mean_embedding))
        else:
            model.compile()
    objective = Objective(model, loss)
    try:
        if saved:
            model.load_state_dict(saved["model"])
        distributed = distribute(objective, config.shard)
        params, optimizers = list(model.parameters()), make_optimizers(model, config)
        ema, first = [p.detach().clone() for p in params], 0
        if saved:
            shaped_alike(saved["ema"], params)
            ema, first = [like(average, p) for average, p in zip(saved["ema"], params)], saved["step"]
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                load_optimizer(optimizer, state)
    except MISFITS as error:
        raise UserError(f"{path}: does not fit this run ({first_line(error)}); train anew with --overwrite") from None
    del saved
    last = max(first, min(config.max_steps, config.stop_after or config.max_steps))
    B, L, local = config.batch_size, config.seq_len, config.batch_size // world()
    most = rows_at_once(model)
    micro = config.micro_batch_size or next(m for m in range(local, 0, -1) if local % m == 0 and m <= most)

    if rank() == 0:
        model.tokenizer.save(path.with_name("tokenizer.json"))
    log = Log(path.parent, kind, first)
    bar = tqdm(total=config.max_steps, initial=first, unit="step", disable=rank() != 0, file=sys.stderr, mininterval=1)
    meter, stopped = Meter(device, config.skip_bad_steps), False
    kept = f"{path} holds step {first}" if first else "none was saved yet"

    def evaluate(done: int) -> None:
        with weights(objective, ema):
            by_tau = held_out_loss(model, loss, corpus, config.eval_rows if done < config.max_steps else sys.maxsize)
            texts = to_lines(model, sample(model, 4, 16, config.seed))
        if not all(map(math.isfinite, by_tau)):
            raise UserError(f"the held-out loss of step {done} is not a number; {path.with_suffix('.prev.pt')} is the "
                            "save before, if there is one: rename that, and try a smaller --lr")
        log.write(step=done, heldout=sum(by_tau) / 10, heldout_by_tau=by_tau, samples=texts)
        say(f"step {done}: held-out loss {sum(by_tau) / 10:.4f} a position, by tenth of tau "
            + " ".join(f"{x:.3f}" for x in by_tau) + "".join(f"\n    {text}" for text in texts))
    if first >= config.max_steps:
        say(f"{path} has all its {config.max_steps} steps: nothing is left to train")
    owed = first and (first % config.eval_every == 0 or first == config.max_steps) and first not in log.evaluated()
    if total(torch.tensor(float(owed and rank() == 0), device=device)):  # it was cut off in an evaluation
        evaluate(first)
    model.train()
    for step in stop.hold(range(first, last)):
        torch.manual_seed(mix(config.seed, 2, step, rank()))  # dropout
        mean = torch.zeros((), device=device)
        for i in range(rank() * local, (rank() + 1) * local, micro):
            rows = Rows(config.seed, step, range(i, i + micro), B)
            tokens = send(corpus.batch("train", step, rows.index), device)
            with gradients(distributed, more=i + micro < (rank() + 1) * local):
                nll, tau = distributed(tokens, rows)
                (nll.mean() * micro / local).backward()
            nll = nll.detach()
            mean += nll.mean() * micro / local
            meter.rows(nll, tau)
        norm = whole(nn.utils.clip_grad_norm_(params, config.clip or math.inf))  # of the whole batch: backward summed it
        if config.skip_bad_steps:  # a norm that is no number has made the gradients so: zeros leave the step to momentum
            for p in params:
                if p.grad is not None:
                    p.grad.copy_(torch.where(norm.isfinite(), p.grad, 0))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad()
        # the average of the first steps forgets faster, or it would keep the initial weights
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(config.ema, (1 + step) / (10 + step)))
        meter.step(mean, norm)
        bar.update()

        done, stopped = step + 1, stop.asked()
        judged = done % config.eval_every == 0 or done == config.max_steps
        save = judged or stopped or done == last
        if done % config.log_every == 0 or save:  # the only place that waits for the device
            line = meter.read(done, math.log(model.V), kept)
            speed = line.pop("steps_per_s") * B * L
            log.write(step=done, lr=learning_rate(step, config), tokens_per_s=round(speed), **line)
            bar.set_postfix_str(f"loss {line['loss'] or math.nan:.3f}, {speed / 1000:.1f}k tokens/s")
        if save:
            state = to_save(dict(model=model.state_dict(), ema=ema, optimizers=[o.state_dict() for o in optimizers]))
            try:
                if rank() == 0:
                    write_checkpoint(path, state | dict(
                        kind=kind, config=lasting(config) | {"dataset": Path(config.dataset).name, "data_dir": ""},
                        source=corpus.meta["source"], tokenizer=model.tokenizer.checksum, log_p=model.log_p, step=done))
                kept = f"{path} holds step {done}"
            except UserError as error:
                if stopped or done == last:
                    raise
                say(f"{error}; tries again at the next save")
        if stopped:
            break
        if judged:
            stop.let()
            evaluate(done)
            meter.clear()  # its clock stands still meanwhile
    bar.close()
    if stopped:
        raise KeyboardInterrupt(f"stopped; {kept}, --resume goes on")
    overwrite(params, ema)
    unshard(objective)
    model.eval()
    if rank() == 0 and last == config.max_steps:
        picture(path.with_suffix(".loss.png"), log.plot)


# -------------------------------------------------------------------------------------------------- 7. Command line


def build(config: Config, tokenizer: data.Tokenizer, log_p: Tensor, kind: str = "flm",
          network: type[Transformer] = Transformer) -> Transformer:
    """A new network, alike on every process; its weights are a function of the seed."""
    torch.manual_seed(mix(config.seed, 1))
    model = network(config, tokenizer.vocab_size, log_p, kind)
    model.tokenizer = tokenizer
    return model


def corpus_of(config: Config) -> data.Corpus:
    """The tokenised text of these settings."""
    return data.prepare(**{name: getattr(config, name) for name in (
        "dataset", "data_dir", "data_url", "tokenizer", "vocab_size", "seq_len", "packing", "seed", "batch_size")})


def corpus_for(config: Config, device: torch.device) -> data.Corpus:
    """The text to train on, made once a machine; settles what the device decides of the settings."""
    if config.bf16 is None:  # the first process decides for all
        config.bf16 = bool(total(torch.tensor(float(rank() == 0 and bf16_is_faster(device)), device=device)))
    return first_does(lambda: corpus_of(config), device)


def load(path: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """The network of a checkpoint runs/NAME/K.pt with its average weights, ready to write; also .kind, .tokenizer, .config,
    .step, the steps it was trained, and .source, the checksum of its text.

    Needs no more than the run folder. Raises UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    content = read_checkpoint(path)
    tokenizer = data.Tokenizer.load(path.parent / "tokenizer.json")
    try:
        if tokenizer.checksum != content["tokenizer"]:
            raise ValueError("the tokenizer.json beside it is another's")
        config = Config(**content["config"])
        validate(asdict(config), Config)
        check(config)
        fits(config, tokenizer.vocab_size, content)
        model = build(config, tokenizer, content["log_p"], content["kind"])
        shaped_alike(content["ema"], model.parameters())
        overwrite(model.parameters(), content["ema"])
        model.step, model.source = content["step"], content["source"]
    except (*MISFITS, UserError) as error:
        raise UserError(f"{path}: does not fit this program ({first_line(error)}); train it anew: {program(path.stem)} "
                        f"--run-dir {path.parent} --overwrite") from None
    model.config.bf16 = model.config.bf16 and bf16_is_faster(torch.device(device))
    return model.to(device).eval()


def fits(config: Config, V: int, content: dict) -> None:
    """Raises ValueError unless a checkpoint's tensors have the sizes that its settings name: no network is made larger than
    the file it comes from."""
    D, weights = config.width, content["model"]
    shapes = {"embedding": (V, D), "time_s.mlp.0.weight": (config.cond_width, 256),
              **{f"blocks.{i}.qkv.weight": (3 * D, D) for i in range(config.depth)}}
    if content["log_p"].shape != (V,) or any(weights[name].shape != shape for name, shape in shapes.items()):
        raise ValueError("its weights have other shapes than its settings name")


def to_lines(model: Transformer, tokens: Tensor) -> list[str]:
    """Tokens (n, L) as one line a text, line breaks and backslashes escaped; a padded text stops at its end token."""
    lines = []
    for ids in tokens.tolist():
        if not model.config.packing and model.tokenizer.end in ids:
            ids = ids[: ids.index(model.tokenizer.end)]
        lines.append(page.on_one_line(model.tokenizer.decode(ids)))
    return lines


def show(name: str, model: Transformer, tokens: Tensor) -> None:
    """Prints texts (n, L) behind their name, packed ones on lines of their own, from one process."""
    between = "\n    " if model.config.packing else "  "
    if rank() == 0:
        print(between.join([f"{name}:", *to_lines(model, tokens)]), flush=True)


def write_samples(config: Config, kind: str, sample: Callable) -> None:
    """--sample: texts of the run's K.pt, one a line, to --out or standard output."""
    model, known, shown = load(Path(config.run_dir) / f"{kind}.pt", setup(config.device, config.threads)), None, None
    if config.prompt or config.infill:
        known, shown = prompts.parse(model.tokenizer, model.config.seq_len, model.config.packing, config.prompt,
                                     config.infill, config.mask_char)
        if model.mark is None and kind in ("flm", "fmlm"):
            say(f"{config.run_dir}: was trained without --condition-prob, so known tokens are only put in place at each "
                "step, as noisy as the others, which is the weaker way")
    film = page.Film(model) if config.html else None
    more = {"see": film.see} if film else {}
    tokens = sample(model, config.num_samples, config.sample_steps, config.seed, known=known, **more)
    lines = to_lines(model, tokens[:, :shown])
    if film:
        film.save(Path(config.html), lines, tokens[:, :shown])
    try:
        with open(config.out, "w", encoding="utf-8") if config.out else contextlib.nullcontext(sys.stdout) as file:
            file.write("".join(line + "\n" for line in lines))
    except OSError as error:
        out = config.out or "standard output"
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None


def command_line(argv: list[str]) -> tuple[dict, set[str]]:
    """The settings of a command line, a dict of Config's fields, and the names of the flags that were given."""
    def defaults(f: Field) -> str:
        own = [f"{f.default}"] * (f.default not in ("", None))
        return "; ".join(own + [f"{name}: {preset[f.name]}" for name, preset in PRESETS.items() if f.name in preset])
    given = parse(argv, Config, __doc__, defaults)
    dataset = given.get("dataset", Config.dataset)
    settings = asdict(Config()) | PRESETS.get(dataset, PRESETS["a text file"]) | given
    settings["run_dir"] = settings["run_dir"] or str(Path("runs") / (Path(dataset).name.split(".")[0] or "text"))
    validate(settings, Config)
    return settings, set(given)


@unlocks()
def main(argv: list[str]) -> None:
    settings, given = command_line(argv)
    if settings["sample"]:
        return write_samples(Config(**settings), "flm", partial(sample, churn=settings["churn"],
                                                              guidance=settings["guidance"]))
    if not settings["resume"]:  # else those it was begun with count
        sources.find(settings["dataset"], settings["data_dir"], settings["data_url"])
    config = Config(**open_folder(settings, given, "flm", Config))
    check(config)
    device = setup(config.device, config.threads)
    corpus = corpus_for(config, device)
    model = build(config, corpus.tokenizer, corpus.log_p).to(device)
    if rank() == 0 and not config.resume:
        clear(Path(config.run_dir), "flm", "fmlm", "correction")  # a map distilled from the old flow goes with it
        write_settings(config, "flm")
    say(f"{config.dataset}: {corpus.blocks('train')} rows of {config.seq_len} tokens to train on, "
        f"{'none (too little text)' if corpus.borrowed else corpus.blocks('heldout')} held out, V = {model.V}; "
        f"{config.parameterization} network, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {'bfloat16' if config.bf16 else 'float32'} on "
        f"{device}, {world()} x {torch.get_num_threads()} threads")
    train(model, flow_loss, corpus, config, "flm", sample)
    if not 0 < config.stop_after < config.max_steps:
        for steps in (1, 4, 16, 64):
            show(f"{steps} step{'s' * (steps > 1)}", model, sample(model, 8, steps, config.seed))


if __name__ == "__main__":
    sys.exit(guard(main, resumes=True))
