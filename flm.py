"""Flow language model (FLM): writes all tokens of a text at once, by a flow from noise to data.

    python flm.py                                   # train on short sentences, then write new ones
    python flm.py --dataset my.txt                  # any UTF-8 text, one document per line
    python flm.py --dataset lm1b                    # the paper's setting; downloads 1.8 GB
    python flm.py --sample --run-dir runs/sentences --sample-steps 64 --num-samples 20
    python flm.py --sample --run-dir runs/sentences --prompt "I want"
    torchrun --standalone --nproc_per_node=8 flm.py --dataset lm1b

Paper: "One-step Language Modeling via Continuous Denoising", arXiv 2602.16813.
Differences from a GPT, marked [FLM] below:
    - The input is a noisy one-hot vector per position: x_t = (1-t) x0 + t x1 in R^V, with x0
      Gaussian noise and x1 the one-hot token. t = 0 is noise, t = 1 is data. The network reads
      x_t only through x_t E, with E (V, D) its input embedding. So the code stores only this
      product, the `state` (B, L, D).
    - The network predicts all clean tokens from the state and the time. Attention is not causal.
    - Training and sampling are uniform in tau(t), not in t. The paper's tau is the accuracy of
      decoding a noisy token, rescaled to 0 for a guess. Clock.respace() adapts it to the text.
    - A text is written by solving an ordinary differential equation from noise to data.
distill.py turns a flow into a flow map (FMLM), which jumps from a time tau_s to a later tau_t in
one evaluation. Only a flow map uses the second time input of the network.
B, L, V, D: batch size, sequence length, vocabulary size, network width.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import deque
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError, first_line, readable

# ------------------------------------------------------------------------------------ 1. Clock

def decodability(t, V):
    """tau(t) = (V P - 1)/(V - 1), where P is the probability that argmax x_t is the clean token.

    P = E[Phi(z + m)^(V-1)] with m = t/(1-t). In units of the noise, the clean coordinate is z + m,
    z ~ N(0, 1), and each of the V - 1 others is below it with probability Phi(z + m). The
    trapezoid rule on 401 nodes is exact to 1e-14.
    t: float64, any shape, in [0, 1). tau rises from 0 (a random guess) to 1.
    """
    z = torch.linspace(-12, 12, 401, dtype=torch.float64)
    m = (t / (1 - t))[..., None]
    log_density = (V - 1) * torch.special.log_ndtr(z + m) - z**2 / 2
    P = log_density.exp().sum(-1) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    return (V * P - 1) / (V - 1)

class Clock(nn.Module):
    """[FLM] Time re-parameterisation: t as a function of tau in [0, 1].

    Training and sampling are uniform in tau, so tau(t) is the cumulative distribution of their
    times. With uniform t, most steps would be spent where every token is still undecided or already
    decided. The paper's tau is the decodability of a token. respace() adapts tau to the text.
    """

    def __init__(self, V, adaptive=False, nodes=4096, slices=10):
        super().__init__()
        t = torch.arange(nodes, dtype=torch.float64) / nodes
        tau = decodability(t, V).float()
        tau[0] = 0
        # in float32, tau reaches 1 before t does; only the last node may be 1, or t(1) would be 0/0
        below, one = tau < 1, torch.ones(1)
        tau = torch.cat([tau[below], one])
        t = torch.cat([t[below].float(), one])
        self.register_buffer("paper", torch.stack([tau, t]), persistent=False)
        self.register_buffer("nodes", self.paper.clone(), persistent=adaptive)
        # sums of the training loss, and their counts, by slice of tau
        self.register_buffer("sums", torch.zeros(2, slices), persistent=adaptive)

    def t(self, tau):
        """t(tau), float32, any shape. t(0) = 0 and t(1) = 1 exactly."""
        return interpolate(tau, self.nodes[0], self.nodes[1])

    def tau(self, t):
        """tau(t), the inverse of t(tau)."""
        return interpolate(t, self.nodes[1], self.nodes[0])

    def paper_tau(self, tau):
        """The paper's tau at the time t(tau). It is the time input of the network, because
        respace() does not change it."""
        return interpolate(self.t(tau), self.paper[1], self.paper[0])

    def by_slice(self, nats, tau):
        """The contribution (2, slices) of losses (B,) at times tau (B,) to `sums`."""
        slices = (tau * self.sums.shape[1]).long().clamp(max=self.sums.shape[1] - 1)
        both = torch.stack([nats, torch.ones_like(nats)])
        return torch.zeros_like(self.sums).index_add_(1, slices, both)

    def respace(self):
        """Sets tau(t) to the mean of the decodability and the relative fall of the loss up to t.

        Half of the times are then the paper's, and half are where the loss falls. The paper's times
        alone are rare at small t, where the length of a text and its frequent words are decided.
        """
        loss = self.sums[0] / self.sums[1]  # in the middle of each slice
        loss = loss.cummin(0).values  # the exact loss falls; its estimate is noisy
        first = loss[0] + (loss[0] - loss[1]) / 2  # at tau = 0
        fall = first - loss[-1]
        if not fall > 0:
            return  # no fall, or NaN: a slice has no loss yet
        zero, one = loss.new_zeros(1), loss.new_ones(1)
        removed = torch.cat([zero, (first - loss) / fall, one])
        middle = (torch.arange(len(loss), device=loss.device) + 0.5) / len(loss)
        t = self.t(torch.cat([zero, middle, one]))  # where `removed` is known, by the old tau
        tau = (self.paper[0] + interpolate(self.paper[1], t, removed)) / 2
        self.nodes[0, :-1] = tau[:-1].clamp(max=1 - 2**-24)  # only the last node is 1
        self.sums.zero_()

def interpolate(x, x_nodes, y_nodes):
    """The piecewise linear function through (x_nodes, y_nodes), evaluated at x (any shape)."""
    i = torch.searchsorted(x_nodes, x.contiguous(), right=True)
    i = i.clamp(1, len(x_nodes) - 1)
    x0, x1 = x_nodes[i - 1], x_nodes[i]
    y0, y1 = y_nodes[i - 1], y_nodes[i]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0))

# ------------------------------------------------------------------------- 2. Batch randomness

SAMPLING, EVALUATION = -1, -2  # in place of a training step

@dataclass(frozen=True)
class Rows:
    """The random numbers of some rows of a global batch: functions of (seed, step, row, purpose).

    So a run on two processes uses the same numbers as on one (except for dropout), and resuming
    needs no saved generator state. A purpose names an independent stream of numbers.
    """

    seed: int
    step: int  # a training step, SAMPLING or EVALUATION
    index: range  # the numbers of these rows in the global batch
    total: int  # rows of the global batch

    def normal(self, shape, device, *purpose):
        """N(0, 1) numbers (B, *shape), drawn on the device."""
        x = torch.empty(len(self.index), *shape, device=device)
        generator = torch.Generator(device)
        for i, row in enumerate(self.index):
            key = repr((self.seed, self.step, row, purpose)).encode()
            seed = int(hashlib.blake2b(key, digest_size=7).hexdigest(), 16)  # 56 bits
            x[i].normal_(generator=generator.manual_seed(seed))
        return x

    def uniform(self, shape, device, *purpose):
        """U(0, 1) numbers (B, *shape), the same on every device: drawn on the CPU."""
        white = self.normal(shape, "cpu", "uniform", *purpose)
        return send(torch.special.ndtr(white), device)

    def times(self, device):
        """tau (B,) ~ U(0, 1), stratified: row i has tau in the i-th of `total` equal intervals.
        Rows contain random texts, so a text has a new interval in each epoch."""
        interval = torch.arange(self.index.start, self.index.stop, device=device)
        return (interval + self.uniform((), device, "time")) / self.total

def send(x, device):
    """Copies a CPU tensor to the device without waiting for it."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)

def draw_known(model, tokens, rows):
    """Prompts for a training batch: token ids (B, L), -1 where unknown.

    With probability condition_prob, some tokens of a row are known: a prefix or random positions,
    equally often. At least one position stays unknown. Returns None outside of training and for a
    model that takes no prompts.
    """
    if not (model.training and model.takes_prompts):
        return None
    L = tokens.shape[1]
    u = rows.uniform((3 + L,), tokens.device, "known")
    chosen = u[:, 0:1] < model.config.condition_prob
    use_prefix, share = u[:, 1:2] < 0.5, u[:, 2:3]
    # positions with score < share are known; scores increase along the row or are random
    score = torch.where(use_prefix, torch.arange(L, device=tokens.device) / L, u[:, 3:])
    known = (score < share) & (score < score.amax(1, keepdim=True))
    return torch.where(chosen & known, tokens, -1)

# ------------------------------------------------------------------------------------- 3. Loss

def flow_loss(model, tokens, rows):
    """[FLM] The training loss: cross-entropy of the clean tokens at a random time of each row.

    tokens (B, L) -> cross-entropy (B,) in nats per unknown position, and the times tau (B,). The
    end tokens that pad a row count like all other tokens.
    """
    tau = rows.times(tokens.device)
    known = draw_known(model, tokens, rows)
    t = model.clock.t(tau)[:, None, None]
    state = torch.lerp(model.noise(rows), model.clean(tokens), t)  # x_t E, x_t = (1-t) x0 + t x1
    logits = model(state, tau, known=known)
    return mean_unknown(cross_entropy(logits, tokens), known), tau

def cross_entropy(logits, target):
    """Cross-entropy in nats, (B, L), of logits (B, L, V); target: ids (B, L) or probs (B, L, V)."""
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
    return nats.view(logits.shape[:2])

def mean_unknown(nats, known=None):
    """The mean (B,) of nats (B, L) over the unknown positions (known < 0)."""
    if known is None:
        return nats.mean(1)
    unknown = known < 0
    return (nats * unknown).sum(1) / unknown.sum(1)

# --------------------------------------------------------------------------------- 4. Samplers

def euler(denoiser, state, clock, steps, clean=lambda probs: probs):
    """[FLM] Euler sampler on a uniform grid of tau. Yields (tau, state, probs) of each step.

    denoiser(state, tau (B,), tau_next (B,)) -> probs (B, L, V): E[x1 | x_t] for a flow, which
    ignores tau_next. clean(probs) is a state with probs in place of x1; the default is for states
    x_t in R^V. most_probable() makes a text of the last probs.
    """
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    for i, (tau, tau_next) in enumerate(zip(taus, taus[1:])):
        probs = denoiser(state, tau.expand(len(state)), tau_next.expand(len(state)))
        yield tau, state, probs
        if i + 1 == steps:
            return  # the state at t = 1 is clean(probs)
        t, t_next = clock.t(tau), clock.t(tau_next)
        # the flow: dx/dt = E[x1 - x0 | x_t] = (E[x1 | x_t] - x_t) / (1 - t), because
        # x1 - x_t = (1-t) (x1 - x0). The mean of a one-hot x1 is its probabilities, which
        # cross-entropy learns.
        velocity = (clean(probs) - state) / (1 - t)
        state = state + (t_next - t) * velocity

def ancestral(denoiser, state, clock, steps, clean, noise, uniform):
    """Ancestral sampler: draws tokens, then the next state given these tokens (DDIM, eta = 1).

    Yields (tau, state, tokens (B, L)); the last tokens are the text. noise(i) is a state at t = 0
    and uniform(i) are (B, L) uniform numbers, fresh in each step i. The last step also draws its
    tokens and does not take the argmax. So for L = 1 and the exact denoiser, the texts have exactly
    the distribution of the data for any number of steps. For L > 1, each step draws the positions
    independently. This error vanishes as the number of steps grows.
    """
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    for i, (tau, tau_next) in enumerate(zip(taus, taus[1:])):
        probs = denoiser(state, tau.expand(len(state)), tau_next.expand(len(state)))
        tokens = draw_tokens(probs, uniform(i))
        yield tau, state, tokens
        t, u = clock.t(tau), clock.t(tau_next)  # u > t is the next, cleaner time
        # Let x_t = (t/u) x_u + fresh noise N(0, (1-t)^2 - (t/u)^2 (1-u)^2). Given x1, it is then
        # N(t x1, (1-t)^2), as in the flow. By Bayes' rule, x_u given x_t and x1 is Gaussian, with
        # mean a x_t + b x1 and variance v.
        a = t * (1 - u) ** 2 / (u * (1 - t) ** 2)
        b = (u - t) * (u + t - 2 * u * t) / (u * (1 - t) ** 2)
        v = (1 - u) ** 2 / u * b
        state = a * state + b * clean(tokens) + v.sqrt() * noise(i)

def draw_tokens(probs, uniform):
    """Draws tokens (...) from probs (..., V) by inverting the cumulative sums at uniform (...)."""
    sums = probs.cumsum(-1)
    tokens = torch.searchsorted(sums, uniform[..., None] * sums[..., -1:], right=True)
    return tokens[..., 0].clamp(max=probs.shape[-1] - 1)

def sample(model, n, steps, seed, sampler="euler", temperature=1.0, known=None):
    """[FLM] Writes n texts, all positions at once, in `steps` network evaluations: tokens (n, L).

    Text i depends on the settings, the seed and i only. known: token ids (L,) or (n, L), -1 where
    unknown. Raises UserError for "euler" with a temperature: it needs the mean at temperature 1.
    """
    if sampler == "euler" and temperature != 1:
        raise UserError(f"--temperature {temperature}: needs --sampler ancestral")

    def solve(rows, given):
        def denoiser(state, tau, tau_next):
            return (model(state, tau, known=given) / temperature).softmax(-1)

        arguments = denoiser, model.noise(rows), model.clock, steps, model.clean
        if sampler == "euler":
            return most_probable(model, last(euler(*arguments)), given)
        noise = partial(model.noise, rows)
        uniform = partial(rows.uniform, (model.config.seq_len,), model.device)
        return last(ancestral(*arguments, noise, uniform))

    return in_batches(model, n, seed, solve, known)

def last(sampler_steps):
    """The probs or tokens of the last step that a sampler yields."""
    return deque(sampler_steps, maxlen=1).pop()[2]

def most_probable(model, probs, known=None):
    """The text (B, L) of the last probs (B, L, V): the most probable token of each position.

    known: token ids (B, L), -1 where unknown. A padded row consists of a text and then end tokens
    only, so its length n is chosen first. Otherwise a text whose length is uncertain would be too
    short: each position near its end may be an end token or one of many words, each less probable
    than the end token.
    """
    if model.config.packing:
        return probs.argmax(-1)
    end = model.tokenizer.end
    p = probs[..., end]  # P(end)
    if known is not None:
        p = torch.where(known < 0, p, (known == end).to(p))
    # P(n) is the product of 1 - p before position n and of p from there on. So position i changes
    # log P by log((1-p)/p) = -logit(p) if it belongs to the text.
    log_P = F.pad(-torch.special.logit(p, eps=1e-6).cumsum(1), (1, -1))  # n = 0 ... L - 1
    inside = torch.arange(p.shape[1], device=p.device) < log_P.argmax(1, keepdim=True)
    best, second = probs.topk(2).indices.unbind(-1)
    return torch.where(inside, torch.where(best == end, second, best), end)

@torch.no_grad()
def in_batches(model, n, seed, solve, known=None):
    """n texts (n, L) from solve(rows, known (B, L) or None) -> tokens (B, L), in batches."""
    if known is not None and not model.takes_prompts:
        raise UserError("this model was trained without prompts; train with --condition-prob 0.1")
    batch, texts, given = batch_rows(model), [], None
    for i in range(0, n, batch):
        rows = Rows(seed, SAMPLING, range(i, min(i + batch, n)), n)
        if known is not None:
            given = known.expand(n, -1)[i : i + batch].to(model.device)
        tokens = solve(rows, given)
        texts.append(tokens if given is None else torch.where(given < 0, tokens, given))
    return torch.cat(texts).cpu()

def batch_rows(model):
    """Rows per forward pass: up to 32,768 tokens, and logits of 1 GiB or 1/12 of GPU memory."""
    room, L = 2**30, model.config.seq_len
    if model.device.type == "cuda":
        room = torch.cuda.get_device_properties(model.device).total_memory // 12
    return max(1, min(2**15 // L, room // (4 * L * model.V)))

# ---------------------------------------------------------------------------------- 5. Network

class TimeEmbedding(nn.Module):
    """[FLM] tau (B,) -> (B, width): sinusoids of tau * scale, then a two-layer MLP."""

    def __init__(self, width, scale):
        super().__init__()
        frequencies = scale * 10000 ** -(torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tau):
        angles = tau[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

def rotate(x, cos, sin):
    """Rotary embedding of queries and keys: x (B, L, 2, heads, 2k); cos and sin (L, 1, 1, k)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class Block(nn.Module):
    """[FLM] Attention over all positions, then an MLP, both modulated by the time (adaLN)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads, self.cap = config.heads, config.attention_cap
        self.norm1 = nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm2 = nn.LayerNorm(D, bias=False)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), gelu, nn.Linear(4 * D, D))
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = nn.Linear(config.cond_width, 6 * D)

    def attend(self, q, k, v):
        """Attention: q, k, v (B, heads, L, head width) -> the same shape.

        The fused kernel has no cap and is slower for short rows on a CPU. extras/baselines.py
        replaces this method with causal and with cached attention.
        """
        if not self.cap and (q.is_cuda or q.shape[-2] > 64):
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        return scores.softmax(-1) @ v

    def forward(self, x, cond, cos, sin):
        """x (B, L, D), cond (B, cond_width) -> (B, L, D)."""
        B, L, D = x.shape
        modulation = self.modulation(cond)[:, None].to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)

        # norm1(x) (1 + scale1) + shift1; addcmul reads and writes memory once
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        qkv = self.qkv(h).view(B, L, 3, self.heads, D // self.heads)
        qk = rotate(qkv[:, :, :2], cos, sin).to(qkv.dtype)
        q, k = qk.transpose(1, 3).unbind(2)  # (B, heads, L, D / heads) each
        v = qkv[:, :, 2].transpose(1, 2)
        h = self.attend(q, k, v)
        h = self.out(h.transpose(1, 2).reshape(B, L, D))
        x = torch.addcmul(x, gate1, self.dropout(h).to(x.dtype))

        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        h = self.mlp(h)
        return torch.addcmul(x, gate2, self.dropout(h).to(x.dtype))

class Transformer(nn.Module):
    """[FLM] The denoiser network, and the functions that turn noise and tokens into its states.

    The network reads x_t only through x_t E, where E (V, D) is its input embedding. A sampler step
    is a linear combination of x_t, tokens or probabilities, and noise. So a step can be computed on
    their products with E, and noise can be drawn in D dimensions: x0 E ~ N(0, E^T E). Only the
    logits have V columns.

    A flow map has a second time embedding (two_times). Attributes: embedding (V, D), clock, config
    and tokenizer (set by build() and load()).
    """

    def __init__(self, config, V, two_times=False):
        super().__init__()
        D, L = config.width, config.seq_len
        self.config, self.V, self.bf16 = config, V, False
        self.clock = Clock(V, config.clock == "adaptive")
        self.cached_factor = None, None
        self.embedding = nn.Parameter(torch.empty(V, D).uniform_(-1, 1) / math.sqrt(D))  # E
        # padded rows start with a document, so their absolute positions are informative
        self.position = None if config.packing else nn.Parameter(torch.zeros(L, D))
        self.takes_prompts = config.condition_prob > 0
        self.known_embedding = nn.Parameter(torch.zeros(D)) if self.takes_prompts else None
        # time_s embeds the time of the state, the only time of a flow; time_t embeds the later time
        # to which a flow map jumps
        self.time_s = TimeEmbedding(config.cond_width, config.time_scale)
        self.time_t = TimeEmbedding(config.cond_width, config.time_scale) if two_times else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, bias=False)
        self.modulation = nn.Linear(config.cond_width, 2 * D)
        self.head = nn.Linear(D, V)

        # rotary positions
        k = D // config.heads // 2
        angles = torch.arange(L)[:, None, None, None] * 10000 ** -(torch.arange(k) / k)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

        # as in the paper: each block starts as the identity, and all tokens start equally likely
        zero = [*(block.modulation for block in self.blocks), self.modulation, self.head]
        if two_times:
            zero.append(self.time_t.mlp[-1])  # a map starts equal to its flow
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def device(self):
        return self.embedding.device

    def noise(self, rows, *purpose):
        """[FLM] The state x0 E at t = 0, (B, L, D), of these rows.

        V <= D: x0 E with x0 ~ N(0, I_V). V > D: z chol(E^T E)^T with z ~ N(0, I_D), which has the
        same distribution.
        """
        shape = self.config.seq_len, min(self.V, self.config.width)
        white = rows.normal(shape, self.device, *purpose)
        return white @ (self.embedding if self.V <= self.config.width else self.factor().T)

    def factor(self):
        """chol(E^T E), (D, D), differentiable in E. NaN if it does not exist: training stops."""
        E = self.embedding
        if not E.requires_grad and self.cached_factor[0] == E._version:  # counts changes of E
            return self.cached_factor[1]
        # Gradients reach E through the noise, too. If the gradient of gram = E^T E is G, then that
        # of E is E (G + G^T) = 2 E G, because G from cholesky is symmetric. To save one of the two
        # products, only the left E is differentiated; the line after it doubles the gradient.
        gram = E.T @ E.detach()
        gram = 2 * gram - gram.detach()
        factor, failed = torch.linalg.cholesky_ex(gram)  # unlike cholesky, does not synchronise
        factor = factor.where(failed == 0, math.nan)
        if not E.requires_grad:
            self.cached_factor = E._version, factor
        return factor

    def clean(self, tokens_or_probs):
        """[FLM] The state x1 E at t = 1, (B, L, D), of tokens (B, L) or probs (B, L, V)."""
        if tokens_or_probs.is_floating_point():
            return tokens_or_probs @ self.embedding
        return F.embedding(tokens_or_probs, self.embedding)

    def forward(self, state, tau_s, tau_t=None, known=None):
        """Logits (B, L, V), float32, of the clean tokens.

        state (B, L, D) at time tau_s (B,). With tau_t (B,), for a flow map: the logits of
        delta_{s,t}. With these probs, one Euler step from tau_s lands where the exact trajectory is
        at tau_t. known (B, L): given tokens, -1 where unknown; their state is not read.
        """
        L = state.shape[1]
        cond = self.time_s(self.clock.paper_tau(tau_s))
        if tau_t is not None:
            cond = cond + self.time_t(self.clock.paper_tau(tau_t))
        cond = F.silu(cond)
        x = state
        if known is not None:
            given = self.clean(known.clamp(min=0)) + self.known_embedding
            x = torch.where((known < 0)[..., None], x, given)
        if self.position is not None:
            x = x + self.position[:L]
        with torch.autocast(state.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                x = block(x, cond, self.cos[:L], self.sin[:L])  # x stays in float32
            shift, scale = self.modulation(cond)[:, None].to(x.dtype).chunk(2, dim=-1)
            x = torch.addcmul(shift, self.norm(x), 1 + scale)
            return self.logits(x)

    def logits(self, x):
        """Features (B, L, D) -> logits (B, L, V), capped at logit_cap if it is not 0."""
        cap, weight, bias = self.config.logit_cap, self.head.weight, self.head.bias
        if x.is_cuda:  # matrix products are faster if V is a multiple of 64
            weight = F.pad(weight, [0, 0, 0, -self.V % 64])
            bias = F.pad(bias, [0, -self.V % 64])
        if not cap:
            return F.linear(x, weight, bias)[..., : self.V].float()
        # cap tanh(z / cap) = 2 cap sigmoid(2 z / cap) - cap; four times as fast on a CPU
        twice = F.linear(2 / cap * x, weight, 2 / cap * bias)[..., : self.V].float()
        return 2 * cap * twice.sigmoid_() - cap

# --------------------------------------------------------------------------------- 6. Settings

def setting(default, help="", **options):
    """A field of Config, and a flag if it has a help text.

    Options: choices, least, most, and group, the title of the group of flags that it starts.
    """
    return field(default=default, metadata=dict(help=help, **options))

@dataclass
class Config:
    """All settings. The defaults are the paper's for lm1b; PRESETS adapt them to other corpora."""

    dataset: str = setting("sentences", "sentences, words, sotu, lm1b, owt or a file", group="data")
    data_dir: str = setting("", "local copy of lm1b or owt")
    tokenizer: str = setting("bert-base-uncased", "kind of tokens", choices=data.TOKENIZERS)
    vocab_size: int = setting(4096, "largest size of a bpe vocabulary (V)", least=1)
    seq_len: int = setting(128, "tokens in a row (L)", least=1)
    packing: bool = setting(True, "join documents and cut rows; otherwise pad each document")
    depth: int = setting(12, "number of blocks", least=1, group="model")
    width: int = setting(768, "width of the network (D)", least=1)
    heads: int = setting(12, "attention heads", least=1)
    dropout: float = setting(0.1, "dropout rate on the residual branches", most=1)
    condition_prob: float = setting(0.0, "share of training rows with a prompt", most=1)
    cond_width: int = setting(128, least=1)  # of the time embedding
    time_scale: float = setting(1.0)  # factor on tau before its sinusoids
    logit_cap: float = setting(30.0)  # soft cap on the logits; 0: none
    attention_cap: float = setting(0.0)  # soft cap on attention scores; 0: none
    max_steps: int = setting(1_000_000, "training steps", least=1, group="training")
    batch_size: int = setting(512, "rows per step, over all processes", least=1)
    micro_batch_size: int = setting(0, "rows per forward pass; 0: automatic")
    optimizer: str = setting("adamw", "muon: for the matrices of blocks", choices=("adamw", "muon"))
    lr: float = setting(3e-4, "learning rate", most=1)
    embedding_lr: float = setting(1.0)  # learning rate of E, relative to lr
    clock: str = setting("paper", "times of training and sampling", choices=("paper", "adaptive"))
    warmup: int = setting(2500, "steps of learning-rate warm-up")
    decay: float = setting(0.0, "share of the steps with learning-rate decay, at the end", most=1)
    beta2: float = setting(0.999)  # of AdamW
    clip: float = setting(1.0)  # largest gradient norm
    ema: float = setting(0.9999, "decay of the moving average of the weights", most=1)
    seed: int = setting(0, "seed of weights, data order and noise")
    log_every: int = setting(100, least=1)  # steps
    eval_every: int = setting(5000, "steps between evaluations and checkpoints", least=1)
    eval_rows: int = setting(1024, least=1)  # held-out rows of an evaluation
    run_dir: str = setting("", "folder of the run (default: runs/DATASET)", group="run")
    device: str = setting("auto", "device of the network", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = setting(0, "CPU threads per process; 0: PyTorch's default")
    bf16: bool | None = setting(None, "bfloat16 matrix products (default: on CUDA only)")
    compile: bool = setting(True, "torch.compile, on CUDA only")
    resume: bool = setting(False, "continue the run in the folder, with its settings")
    overwrite: bool = setting(False, "replace the run in the folder")
    sample: bool = setting(False, "write texts to stdout instead of training", group="sampling")
    sample_steps: int = setting(64, "network evaluations per text", least=1)
    num_samples: int = setting(16, "number of texts", least=1)
    sampler: str = setting("euler", "sampler of a flow", choices=("euler", "ancestral"))
    temperature: float = setting(1.0, "sampling temperature; not for euler", least=0.01)
    prompt: str = setting("", "beginning of the texts")
    infill: str = setting("", "text with gaps: _ for one character, [MASK:2] for two tokens")

    def saved(self):
        """The settings that decide the weights: data, model and training."""
        names = [f.name for f in fields(Config)]
        return {name: getattr(self, name) for name in names[: names.index("run_dir")]}

SMALL = dict(depth=4, width=128, heads=4, cond_width=64, dropout=0.0, time_scale=100.0, lr=1e-2,
             clock="adaptive", optimizer="muon", decay=1.0, warmup=100, ema=0.99, log_every=20,
             tokenizer="bpe")
PRESETS = {
    "sentences": SMALL | dict(
        vocab_size=4096, seq_len=18, packing=False, condition_prob=0.1,
        max_steps=3200, batch_size=32, lr=7e-3, embedding_lr=0.3, eval_every=500,
        eval_rows=256),
    "words": SMALL | dict(
        tokenizer="chars", seq_len=16, packing=False, condition_prob=0.1, width=96, heads=3,
        max_steps=1150, batch_size=128, eval_every=400, eval_rows=256),
    "sotu": SMALL | dict(
        seq_len=64, max_steps=2000, batch_size=32, eval_every=500, eval_rows=64),
    "lm1b": {},
    "owt": dict(tokenizer="gpt2", seq_len=1024),
    "a text file": SMALL | dict(
        vocab_size=2048, seq_len=32, condition_prob=0.1,
        max_steps=1500, batch_size=64, eval_every=500, eval_rows=128),
}

def check(config):
    """Raises UserError for a setting that is out of range or does not fit the others."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        least, most = f.metadata.get("least", 0), f.metadata.get("most", 2**31)
        if choices and value not in choices:
            raise UserError(f"{flag_of(f.name)} {value}: must be one of {', '.join(choices)}")
        types = (int, float) if f.type is float else f.type
        if not isinstance(value, types) or isinstance(value, bool) and f.type in (int, float):
            name = getattr(f.type, "__name__", f.type)
            raise UserError(f"{flag_of(f.name)} {value}: must be of type {name}")
        if f.type in (int, float) and not least <= value <= most:
            raise UserError(f"{flag_of(f.name)} {value}: must be from {least} to {most}")
    if (config.prompt or config.infill) and not config.sample:
        raise UserError("--prompt and --infill: need --sample")
    B, micro = config.batch_size, config.micro_batch_size
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width}: must be a multiple of 2 * --heads")
    if B % world():
        raise UserError(f"--batch-size {B}: must be a multiple of the {world()} processes")
    if micro and B // world() % micro:
        raise UserError(f"--micro-batch-size {micro}: must divide the rows per process")

def flag_of(name):
    return "--" + name.replace("_", "-")

# -------------------------------------------------------------------------------- 7. Optimizer

class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, for matrices (Jordan et al. 2024).

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and no weight decay, but in float32,
    because most CPUs are slow in bfloat16. A parameter may consist of `stacked` matrices, one below
    the other, as for q, k and v.
    """

    def __init__(self, params, lr, beta=0.95, stacked=1):
        super().__init__(params, dict(lr=lr, beta=beta, stacked=stacked))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["beta"])
                update = p.grad.lerp(state["momentum"], group["beta"])  # Nesterov
                update = update.view(group["stacked"], -1, p.shape[1])
                # with this factor, the RMS of the update is 0.2, about that of AdamW
                scale = 0.2 * math.sqrt(max(update.shape[1:]))
                p.sub_(orthogonalise(update).view(p.shape), alpha=scale * group["lr"])

def orthogonalise(G):
    """Approximates U W^T for each G = U S W^T, (n, rows, columns), by five Newton-Schulz steps."""
    tall = G.shape[1] > G.shape[2]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X
        gram = X @ X.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, poly, X, beta=3.4445)
    return X.mT if tall else X

def make_optimizers(model, config):
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    qkv, matrices = [], []
    if config.optimizer == "muon":
        for block in model.blocks:
            qkv.append(block.qkv.weight)
            matrices += [block.out.weight, block.mlp[0].weight, block.mlp[2].weight]
    special = set(map(id, [model.embedding, *qkv, *matrices]))
    rest = [p for p in model.parameters() if id(p) not in special]
    groups = [dict(params=rest)]
    if model.embedding.requires_grad:
        groups.append(dict(params=[model.embedding], relative_lr=config.embedding_lr))
    betas = 0.9, config.beta2
    optimizers = [torch.optim.AdamW(groups, config.lr, betas, weight_decay=0, fused=True)]
    if matrices:
        groups = [dict(params=qkv, stacked=3), dict(params=matrices)]
        optimizers.append(Muon(groups, config.lr))
    return optimizers

def get_lr(step, config):
    """The learning rate: linear warm-up, then constant, then linear decay to 0."""
    rise = (step + 1) / config.warmup if config.warmup else 1
    left = 1 - step / config.max_steps
    fall = left / config.decay if config.decay else 1
    return config.lr * min(rise, fall, 1)

# ----------------------------------------------------------------------- 8. Processes and runs

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1

def all_reduce(x, op=dist.ReduceOp.SUM):
    if world() > 1:
        dist.all_reduce(x, op)
    return x

def say(text):
    """Prints to stderr from the first process, above the progress bar."""
    from tqdm import tqdm

    if rank() == 0:
        tqdm.write(text, file=sys.stderr)

def setup(config):
    """Sets up threads, device and, under torchrun, the process group; returns the device."""
    # make glibc keep freed memory: otherwise page faults take half of a CPU step at V = 50257
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
    torch.set_flush_denormal(True)  # denormal gradients of an easy corpus are 30 times slower
    if config.threads:
        torch.set_num_threads(config.threads)
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = found if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", found.type):
        raise UserError(f"--device {config.device}: not available here; use --device cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    if device.type == "cuda":
        device = torch.device("cuda", int(local_rank or 0))
        torch.cuda.set_device(device)
    if local_rank and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # tokenising may take hours
    return device

def prepare_corpus(config):
    """The tokenised corpus. One process per machine creates it; the others wait for the lock."""
    names = "dataset", "tokenizer", "seq_len", "packing", "vocab_size", "data_dir"
    corpus = data.prepare(**{name: getattr(config, name) for name in names})
    counts = f"{corpus.rows('train'):,} training rows, {corpus.rows('heldout'):,} held-out rows"
    say(f"{config.dataset}: {counts}, L = {config.seq_len}, V = {corpus.tokenizer.vocab_size}")
    if corpus.splits["heldout"] is corpus.splits["train"]:
        say("no row is held out: the evaluations use the training rows")
    if skipped := corpus.meta["skipped"]:
        say(f"skipped {skipped:,} documents that do not fit in --seq-len {config.seq_len}")
    return corpus

NEW_RUN = "train again with --overwrite"
ENDINGS = ".pt", ".prev.pt", ".config.json", ".log.jsonl", ".samples.txt", ".loss.png"

def config_path(folder, kind):
    return Path(folder, "config.json" if kind == "flm" else f"{kind}.config.json")

locks = []  # the lock of the run folder

def open_run(config, given, *kinds):
    """Locks the run folder; returns the settings to train with: the saved ones with --resume.

    kinds[0] is the model to train; the other kinds depend on it. Raises UserError for settings
    that do not fit, if the folder is in use, if it contains one of the kinds and neither --resume
    nor --overwrite is given, or if `given` differs from the saved settings.
    """
    from filelock import FileLock

    check(config)  # after setup(): the number of processes is known
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        locks.clear()  # releases the lock of an earlier training in this process
        locks.append(FileLock(folder / ".lock"))
        try:
            locks[0].acquire(timeout=0)
        except TimeoutError:
            raise UserError(f"{folder}: in use by another process; use another --run-dir") from None
    found = [kind for kind in kinds if Path(folder, f"{kind}.pt").exists()]
    if config.resume:
        stored = config_path(folder, kinds[0])
        if not stored.exists():
            raise UserError(f"{stored}: no such file, so no run to resume; check --run-dir")
        with readable(stored, NEW_RUN):
            saved = json.loads(stored.read_text())
            config = replace(config, **saved)
            check(config)
        for name in given.keys() & saved.keys():
            if given[name] != saved[name]:
                raise UserError(f"{flag_of(name)}: the run has {saved[name]}; omit it to resume")
    elif found and not config.overwrite:
        raise UserError(f"{folder}: contains {found[0]}.pt; use --resume or --overwrite")
    return config

def begin_run(config, *kinds):
    """Saves the settings of a run. A new run deletes the old models of these kinds.

    It is called after the corpus is prepared, so that a mistake in the settings deletes nothing.
    """
    if rank() == 0:
        for name in [kind + ending for kind in kinds for ending in ENDINGS]:
            if not config.resume:
                Path(config.run_dir, name).unlink(missing_ok=True)
        config_path(config.run_dir, kinds[0]).write_text(json.dumps(config.saved(), indent=1))

@contextlib.contextmanager
def remember_signals():
    """Yields a list of the received signals (Ctrl-C, SIGTERM). A second signal exits at once."""
    received = []

    def handle(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# ------------------------------------------------------------------------------ 9. Checkpoints

def save_checkpoint(path, content):
    """Replaces `path`, completely or not at all; keeps the old file as .prev.pt."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, path.with_suffix(".prev.pt"))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({first_line(error)}); the last checkpoint is "
                        "intact; free disk space, then use --resume") from None

def load_checkpoint(path):
    """The content of a checkpoint: plain values and tensors. Raises UserError."""
    previous = path.with_suffix(".prev.pt")
    if not path.exists() and previous.exists():
        path = previous  # a save was interrupted between its two renames
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one first, or check --run-dir")
    fix = f"replace it with {previous}" if previous.exists() else NEW_RUN
    with readable(path, fix):
        with zipfile.ZipFile(path) as records:
            if damaged := records.testzip():
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)

def build(config, tokenizer, device, bf16=None, network=None):
    """A new network, whose weights are a function of the seed.

    bf16: use bfloat16 matrix products; None: on CUDA only, if the GPU supports them.
    """
    torch.manual_seed(config.seed)
    model = (network or Transformer)(config, tokenizer.vocab_size)
    model.tokenizer, model.bf16 = tokenizer, bool(bf16)
    if bf16 is None and device.type == "cuda":
        model.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return model.to(device)

FlowMap = partial(Transformer, two_times=True)
NETWORKS = dict(flm=Transformer, fmlm=FlowMap)

def load(path, device="cpu", bf16=None, networks=NETWORKS):
    """Loads a trained flow or flow map with its averaged weights. Needs only the run folder.

    Attributes: embedding (V, D), clock, tokenizer, config, kind, step (steps trained) and source
    (checksum of its text). Raises UserError.
    """
    path = Path(path)
    content = load_checkpoint(path)
    with readable(path, NEW_RUN):
        tokenizer = data.Tokenizer.load(path.with_name("tokenizer.json"))
        if content["tokenizer"] != tokenizer.checksum:
            raise ValueError("tokenizer.json belongs to another run")
        config, network = Config(**content["config"]), networks[content["kind"]]
        check(config)
        model = build(config, tokenizer, torch.device(device), bf16, network)
        model.load_state_dict(content["average"])
        for name in ("kind", "step", "source"):
            setattr(model, name, content[name])
    return model.eval().requires_grad_(False)

# --------------------------------------------------------------------------------- 10. Training

class Objective(nn.Module):
    """The loss as a module: DistributedDataParallel needs all uses of the weights in forward()."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, tokens, rows):
        return self.loss(self.model, tokens, rows)

@torch.no_grad()
def estimate_loss(model, loss, corpus, n):
    """Held-out loss in nats by tenth of tau (10 numbers): n texts, each once in every tenth.

    Row i of 10 n has tau in [i, i+1] / (10 n), see Rows.times: its tenth is i // n, its text i % n.
    tau is the paper's, so that losses are comparable between runs and while a clock adapts.
    """
    adapted = model.clock.nodes.clone()
    model.clock.nodes.copy_(model.clock.paper)
    n = min(n, corpus.rows("heldout"))
    batch = batch_rows(model)
    sums = torch.zeros(10, device=model.device)
    for i in range(rank() * batch, 10 * n, world() * batch):
        rows = Rows(0, EVALUATION, range(i, min(i + batch, 10 * n)), 10 * n)
        tokens = corpus.batch("heldout", [row % n for row in rows.index]).to(model.device)
        tenth = torch.tensor([row // n for row in rows.index], device=model.device)
        sums.index_add_(0, tenth, loss(model, tokens, rows)[0])
    model.clock.nodes.copy_(adapted)
    return (all_reduce(sums) / n).tolist()

def evaluate(model, loss, corpus, config, sample):
    """Prints the held-out loss and four texts, and returns them as a log entry."""
    by_tau = estimate_loss(model, loss, corpus, config.eval_rows)
    texts = to_lines(model, sample(model, 4, 16, config.seed))
    heldout = sum(by_tau) / 10
    say(f"held-out loss {heldout:.4f}; by tenth of tau:" + "".join(f" {x:.2f}" for x in by_tau))
    say("".join(f"    {text}\n" for text in texts))
    return dict(heldout=heldout, by_tau=by_tau, samples=texts)

def write_log(path, log):
    """Writes K.log.jsonl, K.samples.txt and K.loss.png beside the checkpoint K.pt."""
    from matplotlib.figure import Figure

    path.with_suffix(".log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    evaluations = [entry for entry in log if "samples" in entry]
    with open(path.with_suffix(".samples.txt"), "w", encoding="utf-8") as file:
        for entry in evaluations:
            file.write("\n    ".join([f"step {entry['step']}", *entry["samples"]]) + "\n")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("loss", "training"), ("heldout", "held out, at the paper's times")):
        entries = [entry for entry in log if name in entry]
        left.plot([entry["step"] for entry in entries], [entry[name] for entry in entries],
                  ".-", label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    for entry in evaluations[-1:]:
        right.bar([i / 10 + 0.05 for i in range(10)], entry["by_tau"], width=0.09)
    right.set(xlabel="tau of the paper", ylabel="held-out loss (nats per token)")
    figure.savefig(path.with_suffix(".loss.png"))

def train(model, loss, corpus, config, kind, sample):
    """Minimises loss(model, tokens, rows) -> (loss (B,), tau (B,)); returns the averaged model.

    Writes K.pt, K.prev.pt, K.log.jsonl, K.samples.txt and K.loss.png into the run folder, with
    K = kind. sample(model, n, steps, seed) -> tokens (n, L) is called in each evaluation. Raises
    UserError if the loss is not finite, and SystemExit after a signal, once the step is saved.
    """
    from tqdm import tqdm

    path, device = Path(config.run_dir, f"{kind}.pt"), model.device

    # the averaged weights (EMA) are evaluated, and used by all other programs
    average = copy.deepcopy(model).eval().requires_grad_(False)
    average.clock = clock = model.clock  # one clock: respace() changes it for both
    adaptive = config.clock == "adaptive" and kind == "flm"  # a map keeps the clock of its flow
    adapt_every = max(1, config.max_steps // 20)
    optimizers = make_optimizers(model, config)
    first, log = 0, []
    if config.resume:
        first, log = resume(path, model, average, optimizers, corpus)
    weights, averages = list(model.parameters()), list(average.parameters())
    if rank() == 0:
        corpus.tokenizer.save(path.with_name("tokenizer.json"))

    if config.compile and device.type == "cuda":
        model.compile()
    objective = Objective(model.train(), loss)
    if world() > 1:  # averages the gradients of all processes
        objective = nn.parallel.DistributedDataParallel(objective)

    # this process trains on `local` rows of each batch, `micro` rows at a time
    B, local = config.batch_size, config.batch_size // world()
    most = config.micro_batch_size or batch_rows(model)
    micro = next(m for m in range(min(local, most), 0, -1) if local % m == 0)
    begin = rank() * local
    bar = tqdm(total=config.max_steps, initial=first, unit="step", disable=rank() > 0,
               mininterval=1, file=sys.stderr)
    with remember_signals() as signals, bar:
        start = time.perf_counter()
        for step in range(first, config.max_steps):
            done = step + 1

            # learning rate
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group in groups:
                group["lr"] = get_lr(step, config) * group.get("relative_lr", 1.0)

            # the gradient, summed over micro-batches; the processes average it in the last one
            torch.manual_seed(config.seed + step * world() + rank())  # dropout
            sums = 0
            for i in range(begin, begin + local, micro):
                rows = Rows(config.seed, step, range(i, i + micro), B)
                numbers = [step * B + row for row in rows.index]  # batch() starts new epochs
                tokens = corpus.batch("train", numbers, config.seed)
                more = world() > 1 and i + micro < begin + local
                with objective.no_sync() if more else contextlib.nullcontext():
                    nats, tau = objective(send(tokens, device), rows)
                    (nats.mean() * micro / local).backward()
                sums += clock.by_slice(nats.detach(), tau)

            # update the weights and their average; its decay is smaller in the first steps
            norm = nn.utils.clip_grad_norm_(weights, config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [p.detach() for p in weights], 1 - decay)
            bar.update()

            # adapt the clock, in the first 60 % of the training
            sums = all_reduce(sums)
            clock.sums += sums
            if adaptive and done % adapt_every == 0 and done <= 0.6 * config.max_steps:
                clock.respace()

            # stop on all processes in the same step
            received = torch.tensor(signals[0] if signals else 0)
            stop = int(all_reduce(received, dist.ReduceOp.MAX))
            save = done % config.eval_every == 0 or done == config.max_steps or stop

            # log; item() waits for the device
            if done % config.log_every == 0 or save:
                nats, norm = sums[0].sum().item() / B, norm.item()
                if not math.isfinite(nats + norm):
                    raise UserError(f"the loss of step {done} is not a number; {path.parent} keeps "
                                    "the last checkpoint; use a smaller --lr")
                seconds = time.perf_counter() - start
                log.append(dict(step=done, loss=nats, grad_norm=norm, seconds=seconds))
                bar.set_postfix_str(f"loss {nats:.3f}")

            # evaluate and save
            if save and not stop:
                say(f"step {done}:")
                log.append(dict(step=done) | evaluate(average, loss, corpus, config, sample))
            if save and rank() == 0:
                # load() builds a Config, so the settings that a subclass adds are left out
                save_checkpoint(path, dict(
                    kind=kind, step=done, log=log, config=Config.saved(config),
                    source=corpus.meta["source"], tokenizer=corpus.tokenizer.checksum,
                    model=model.state_dict(), average=average.state_dict(),
                    optimizers=[optimizer.state_dict() for optimizer in optimizers]))
                write_log(path, log)
            if stop:
                say(f"stopped; {path} contains step {done}; continue with --resume")
                sys.exit(128 + stop)
    locks.clear()
    return average

def resume(path, model, average, optimizers, corpus):
    """Loads an interrupted run; returns its step and log: 0 and [] if it has no checkpoint."""
    if not path.exists() and not path.with_suffix(".prev.pt").exists():
        return 0, []
    saved = load_checkpoint(path)
    with readable(path, NEW_RUN):
        text = corpus.meta["source"], corpus.tokenizer.checksum
        if (saved["source"], saved["tokenizer"]) != text:
            raise ValueError("it was trained on another text")
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return saved["step"], saved["log"]

# ----------------------------------------------------------------------------- 11. Command line

def to_lines(model, tokens, infilled=False):
    """Decodes tokens (n, L): one line per text. A padded text ends before its first end token.

    In an infilled padded text, an end token only shortens its gap.
    """
    lines, end = [], model.tokenizer.end
    for ids in tokens.tolist():
        if not model.config.packing:
            last = len(ids) if infilled else [*ids, end].index(end)
            ids = [i for i in ids[:last] if i != end]
        lines.append(model.tokenizer.decode(ids).replace("\n", "\\n"))
    return lines

def parse_known(model, prompt, infill):
    """Known tokens (L,) of --prompt or --infill, -1 where unknown, and how many tokens to print.

    A gap is `_` for one character if tokens are characters, else [MASK] or [MASK:n] for one or n
    tokens. Raises UserError for a text that does not fit.
    """
    if prompt and infill:
        raise UserError("--prompt and --infill: use only one of them")
    flag, text = ("--infill", infill) if infill else ("--prompt", prompt)
    text = text.encode(errors="ignore").decode()  # drops bytes that are not UTF-8
    tokenizer, L, padded = model.tokenizer, model.config.seq_len, not model.config.packing
    ids = [] if padded or tokenizer.begin is None else [tokenizer.begin]
    # a row ends with an end token if it is padded, or if data.py puts each packed row between a
    # begin and an end token; `ids` is [begin] then
    most = L - 1 if padded or ids else L
    if prompt:
        most -= 1  # room for at least one new token

    # parts with an odd index are gaps
    chars = tokenizer.kind == "chars"
    gap = "(_)" if chars else r" ?(\[MASK(?::\d{1,4})?\])"
    parts = re.split(gap, text) if infill else [text]
    if infill and len(parts) == 1:
        form = "_ for an unknown character" if chars else "[MASK:n] for n unknown tokens"
        raise UserError(f"{flag} {text}: has no gap; write {form}")
    for i, part in enumerate(parts):
        if i % 2:
            ids += [-1] * int(re.sub(r"\D", "", part) or 1)
        else:
            ids += tokenizer.encode([part])[0]
    if infill and -1 not in ids:
        raise UserError(f"{flag} {text}: its gaps have no tokens; write [MASK:1] or more")
    if len(ids) > most:
        raise UserError(f"{flag} {text}: has {len(ids)} tokens, but at most {most} fit; shorten it")

    # the length of an infilled text is known: end tokens fill the rest of a padded row
    known = torch.full((L,), tokenizer.end if infill and padded else -1)
    known[: len(ids)] = torch.tensor(ids)
    return known, len(ids) if infill else L

def write_samples(config, kind, sample, networks=NETWORKS):
    """--sample: prints texts of the run's K.pt, one per line."""
    path = Path(config.run_dir, f"{kind}.pt")
    model, known, shown = load(path, setup(config), config.bf16, networks), None, None
    if config.prompt or config.infill:
        known, shown = parse_known(model, config.prompt, config.infill)
    tokens = sample(model, config.num_samples, config.sample_steps, config.seed, known=known)
    if rank() == 0:
        print("\n".join(to_lines(model, tokens[:, :shown], bool(config.infill))))

def show(title, model, tokens):
    if rank() == 0:
        print("\n    ".join([f"{title}:", *to_lines(model, tokens)]), flush=True)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

def parse(argv, config_type, doc, hidden=()):
    """The settings given on the command line, by name. `hidden` settings have no flag."""
    parser = Parser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_type):
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        options, choices = dict(help=f.metadata["help"]), f.metadata.get("choices")
        if f.type in (bool, bool | None):
            options |= dict(action=argparse.BooleanOptionalAction)
        else:
            metavar = None if choices else f.type.__name__.upper()
            options |= dict(type=f.type, choices=choices, metavar=metavar)
        if options["help"] and f.name not in hidden:
            group.add_argument(flag_of(f.name), **options)
    return vars(parser.parse_args(argv))

def run_command(main):
    """Runs main(argv). Prints a mistake of the user as one line on stderr; exit status 2."""
    status, message = 0, ""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, OSError) as error:
        status, message = 2, str(error)
    # torch.OutOfMemoryError is a RuntimeError; a tensor may also overflow the largest possible size
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("memory|overflow", str(error)):
            raise
        status = 2
        message = f"out of memory ({first_line(error)}); use a smaller --micro-batch-size"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except SystemExit as error:  # of --help or an interrupted training
        status = error.code
    if message and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}:", " ".join(message.split()), file=sys.stderr)
    if dist.is_initialized():
        if status != 2:  # after an error, the others may never reach it
            dist.barrier()
        sys.stderr.flush()
        os._exit(status)  # the threads of gloo may outlive the interpreter
    sys.exit(status)

def main(argv):
    given = parse(argv, Config, __doc__)
    dataset = given.get("dataset", Config.dataset)
    config = Config(**(PRESETS.get(dataset, PRESETS["a text file"]) | given))
    config.run_dir = config.run_dir or str(Path("runs", Path(dataset).name.split(".")[0] or "text"))
    check(config)
    if config.sample:
        options = dict(sampler=config.sampler, temperature=config.temperature)
        return write_samples(config, "flm", partial(sample, **options))
    device = setup(config)
    config = open_run(config, given, "flm", "fmlm")
    corpus = prepare_corpus(config)
    begin_run(config, "flm", "fmlm")
    model = build(config, corpus.tokenizer, device, config.bf16)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{size:.1f}M parameters, bf16 = {model.bf16}, {world()} x {device.type}")
    model = train(model, flow_loss, corpus, config, "flm", sample)
    for steps in (1, 4, 16, 64):
        show(f"steps: {steps}", model, sample(model, 8, steps, config.seed))

if __name__ == "__main__":
    run_command(main)
