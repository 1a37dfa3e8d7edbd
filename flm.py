"""Flow language model (FLM): writes all tokens of a text at once, by a flow from noise to data.

    python flm.py                                   # train on short sentences, then write new ones
    python flm.py --dataset my.txt                  # any UTF-8 text, one document per line
    python flm.py --dataset lm1b                    # the paper's setting; downloads 1.8 GB
    python flm.py --sample --run-dir runs/sentences --num-samples 20 --prompt "I want"
    torchrun --standalone --nproc_per_node=8 flm.py --dataset lm1b

Paper: "One-step Language Modeling via Continuous Denoising", arXiv 2602.16813. [FLM] marks the
places where this file differs from a GPT:
    - The input is a noisy one-hot vector per position, x_t = (1-t) x0 + t x1 in R^V, with noise
      x0 ~ N(0, I) and a one-hot token x1. t = 0 is noise, t = 1 is data.
    - The network, the denoiser D_t, predicts x1 from x_t: a distribution over tokens per position.
      Cross-entropy is least at P(x1 | x_t), and this is E[x1 | x_t], as x1 is one-hot.
    - A text is written by solving dx/dt = E[x1 - x0 | x_t = x] = (D_t(x) - x)/(1-t) from noise at
      t = 0. The solutions have the distribution of x_t at each t (Lipman et al. 2023).
    - Training and sampling are uniform in tau(t) instead of t. tau is the share of positions at
      which argmax x_t is the clean token, rescaled so that a random guess gives 0.
Derivations, on a small example: notebooks/00_from_scratch.ipynb.
The network reads x_t only through its embedding W (V, D). So the code stores the `state` x_t W. Its
line and velocity are those of x_t, times W, and D_t is E[x1 | x_t W]. tau is that of x_t in R^V.
Shapes: B rows of a batch, L tokens of a row, V tokens of the vocabulary, D (no index) the width.
"""

import argparse
import copy
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import UserError

# ------------------------------------------------------------------------------------ 1. Clock
def decodability(t, V):
    """tau(t) = (V P - 1)/(V - 1), where P is the probability that argmax x_t is the clean token.

    P = E[Phi(z + m)^(V-1)] with z ~ N(0, 1), m = t/(1-t), Phi the distribution function of N(0, 1):
    see "The clock" in notebooks/00_from_scratch.ipynb. t: float64, any shape, in [0, 1).
    """
    z = torch.linspace(-12, 12, 401, dtype=torch.float64)  # fine enough: P is right to 1e-14
    m = t / (1 - t)
    log_power = (V - 1) * torch.special.log_ndtr(z + m[..., None])  # log of Phi^(V-1)
    log_density = -(z**2) / 2 - math.log(2 * math.pi) / 2
    P = torch.trapezoid(torch.exp(log_power + log_density), z)
    return (V * P - 1) / (V - 1)

class Clock(nn.Module):
    """[FLM] Time re-parameterisation: t as a function of tau in [0, 1], and its inverse.

    With uniform t, most steps would be spent where argmax x_t is still random or already right.
    With uniform tau, argmax x_t becomes right in about the same share of positions in each step.
    """

    def __init__(self, V, size=4096):
        super().__init__()
        t = torch.arange(size, dtype=torch.float64) / size
        tau = decodability(t, V)
        tau[0] = 0  # exactly, without rounding
        below_one = tau.float() < 1  # the node (1, 1) replaces all whose tau rounds to 1 in float32
        for name, values in (("t_nodes", t), ("tau_nodes", tau)):
            nodes = torch.cat([values[below_one], torch.ones(1)]).float()
            self.register_buffer(name, nodes, persistent=False)

    def t(self, tau):
        """t(tau), float32, any shape. t(0) = 0 and t(1) = 1 exactly."""
        return interpolate(tau, self.tau_nodes, self.t_nodes)

    def tau(self, t):
        """tau(t), the inverse of t(tau)."""
        return interpolate(t, self.t_nodes, self.tau_nodes)

def interpolate(x, x_nodes, y_nodes):
    """The piecewise linear function through (x_nodes, y_nodes), evaluated at x (any shape)."""
    right = torch.searchsorted(x_nodes, x.contiguous(), right=True)  # the first node above x
    right = right.clamp(1, len(x_nodes) - 1)
    left = right - 1
    weight = (x - x_nodes[left]) / (x_nodes[right] - x_nodes[left])
    return y_nodes[left] + weight * (y_nodes[right] - y_nodes[left])

# ------------------------------------------------------------------------------------- 2. Loss
AT_NOISE = 1 / 64  # share of the rows with tau = 0. Few others have t < .4: t(.002) = .4 (V = 4096)

def flow_loss(model, tokens):
    """[FLM] The training loss: tokens (B, L) -> cross-entropy of the clean tokens, at a random time
    for each row, in nats per token (B,), and the times tau (B,), for estimate_loss."""
    tau = uniform_times(len(tokens), tokens.device)
    tau = ((tau - AT_NOISE) / (1 - AT_NOISE)).clamp(min=0)  # 0 with probability AT_NOISE
    t = model.clock.t(tau)[:, None, None]  # (B, 1, 1)
    x0 = model.noise(len(tokens))  # x0 W, (B, L, D)
    x1 = model.clean(tokens)  # x1 W
    state = (1 - t) * x0 + t * x1  # x_t W
    state = insert_known(model, state, draw_known(model, tokens))  # some are given, as in prompts
    logits = model(state, tau)  # (B, L, V)
    return cross_entropy(logits, tokens).mean(1), tau  # known tokens count, with a loss of about 0

def uniform_times(B, device):
    """tau (B,) ~ U(0, 1), stratified for less variance: row i has tau in [i/B, (i+1)/B]."""
    interval = torch.arange(B, device=device)
    return (interval + torch.rand(B, device=device)) / B

def draw_known(model, tokens):
    """Training for prompts: known token ids (B, L), -1 where unknown. With probability
    condition_prob, a random share of the tokens of a row is known."""
    B, L = tokens.shape
    prob = model.config.condition_prob if model.training else 0
    chosen = torch.rand(B, 1, device=tokens.device) < prob
    share = torch.rand(B, 1, device=tokens.device) * chosen
    known = torch.rand(B, L, device=tokens.device) < share
    return torch.where(known, tokens, -1)

def insert_known(model, state, known):
    """The state (B, L, D), replaced by the clean state where known (B, L) is not -1."""
    clean = model.clean(known.clamp(min=0))  # -1 is not an index
    return torch.where(known[..., None] < 0, state, clean)

def cross_entropy(logits, target):
    """Cross-entropy in nats, (B, L), of logits (B, L, V); target: ids (B, L) or probs (B, L, V)."""
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
    return nats.view(logits.shape[:2])

# --------------------------------------------------------------------------------- 3. Samplers
def euler(denoiser, state, clock, steps, clean):
    """[FLM] Euler sampler on a uniform grid of tau. Yields (tau, state, probs) of each step.

    denoiser: state (B, L, D), tau (B,) -> probs (B, L, V), which are E[x1 given the state].
    clean: probs -> probs W (B, L, D). The last probs, at tau = 1 - 1/steps, determine the text.
    """
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    for tau, tau_next in zip(taus, taus[1:]):
        probs = denoiser(state, tau.expand(len(state)))
        yield tau, state, probs
        # x1 - x0 = (x1 - x_t)/(1-t), so dx/dt = E[x1 - x0 | x_t] = (E[x1 | x_t] - x_t)/(1-t)
        t, t_next = clock.t(tau), clock.t(tau_next)
        velocity = (clean(probs) - state) / (1 - t)
        state = state + (t_next - t) * velocity

def denoise(model, known, temperature, state, tau_s, tau_t=None):
    """Probs (B, L, V) of states (B, L, D): D_s, or delta_{s,t} of a map. Known tokens are clean."""
    state = insert_known(model, state, known)
    logits = model(state, tau_s, tau_t)
    return (logits / temperature).softmax(-1)

@torch.no_grad()
def sample(model, n, steps, seed, temperature=1.0, known=None):
    """[FLM] Writes n texts, all positions at once, in `steps` network evaluations: tokens (n, L).

    temperature below 1: more probable and less diverse texts. This is a heuristic: the probs are
    then not E[x1 | x_t]. known: token ids (L,) or (n, L), -1 where unknown.
    """
    texts = []
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on all devices
    for known_rows in batches(model, n, known):
        state = model.noise(len(known_rows), generator)
        denoiser = partial(denoise, model, known_rows, temperature)
        for _, _, probs in euler(denoiser, state, model.clock, steps, model.clean):
            pass  # only the last probs are needed
        tokens = most_probable(model, probs, known_rows)
        texts.append(tokens.cpu())
    return torch.cat(texts)

def batches(model, n, known=None):
    """The known tokens of n texts, -1 where unknown, in batches (B, L) that fit into memory."""
    known = torch.tensor([-1]) if known is None else known  # all are unknown
    known = known.to(model.embedding.device).expand(n, model.config.seq_len)
    return known.split(forward_rows(model))

def forward_rows(model):
    """Rows of a forward pass: 2 to 256, as many as have at most 2^28 logits, which are 1 GiB."""
    return max(2, min(256, 2**28 // (model.config.seq_len * model.V)))  # 2: a map halves them

def most_probable(model, probs, known):
    """The text (B, L) of probs (B, L, V): the most probable length, then tokens. known (B, L).

    Without packing, a row is one text, then end tokens (padded). Argmax at each position would end
    texts early: with P(end) = .4 and 100 words of .006, the end wins. So the length n comes first,
    the one with the largest product Q(n) of 1-p_i for i < n and p_i for i >= n; p_i = P(end) at i.
    """
    text = probs.argmax(-1)
    if not model.config.packing:
        end = model.tokenizer.end
        p, L = probs[..., end], probs.shape[1]
        # log Q(n) = sum of log p_i over all i - sum of log(p_i / (1-p_i)) over i < n
        certain = 14 * L * (2.0 * (known == end) - 1)  # outweighs L unknown ones of at most 13.8
        log_odds = torch.logit(p, eps=1e-6).where(known < 0, certain)
        sums = F.pad(log_odds.cumsum(1), (1, -1))  # sums[n]: i < n; n < L, as each row has an end
        length = sums.argmin(1, keepdim=True)
        no_end = torch.arange(model.V, device=p.device) != end
        words = (probs * no_end).argmax(-1)
        position = torch.arange(L, device=p.device)
        text = torch.where(position < length, words, end)
    return torch.where(known < 0, text, known)

# ---------------------------------------------------------------------------------- 4. Network
class TimeEmbedding(nn.Module):
    """[FLM] tau (B,) -> (B, size): sinusoids of tau * scale, then a two-layer MLP."""

    def __init__(self, size, scale):
        super().__init__()
        frequencies = scale * 10000 ** -(torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, tau):
        angles = tau[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

def rotate(x, cos, sin):
    """Rotary position embedding: x (B, heads, L, 2h), cos and sin (L, h) -> the shape of x."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class Block(nn.Module):
    """[FLM] Attention without causal mask, then an MLP, scaled and gated by the time (adaLN)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads, self.cap = config.heads, config.attention_cap
        self.norm1 = nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.norm2 = nn.LayerNorm(D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"), nn.Linear(4 * D, D))
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = nn.Linear(config.cond_width, 6 * D)

    def attend(self, q, k, v):
        """Attention: q, k, v (B, heads, L, D / heads) -> the same shape. Written out where the
        fused kernel does not work (scores with a cap) or is slower (short rows on a CPU)."""
        if not self.cap and (q.is_cuda or q.shape[2] > 64):
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.mT / math.sqrt(q.shape[3])
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        return scores.softmax(-1) @ v

    def forward(self, x, cond, cos, sin):
        """x (B, L, D), cond (B, cond_width) -> (B, L, D)."""
        B, L, D = x.shape
        modulation = self.modulation(cond)[:, None]  # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.qkv(h).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        q = rotate(q, cos, sin).to(v.dtype)  # cos and sin are float32
        k = rotate(k, cos, sin).to(v.dtype)
        h = self.attend(q, k, v)
        h = h.transpose(1, 2).reshape(B, L, D)
        x = x + gate1 * self.dropout(self.out(h))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.dropout(self.mlp(h))

class Transformer(nn.Module):
    """[FLM] The denoiser, and the functions that make its states. two_times: for a flow map."""

    def __init__(self, config, V, two_times=False):
        super().__init__()
        D, L = config.width, config.seq_len
        self.config, self.V, self.bf16 = config, V, False
        self.clock = Clock(V)
        self.embedding = nn.Parameter(torch.empty(V, D).uniform_(-1, 1) / math.sqrt(D))
        # learned positions besides the rotary ones, if padded: position i is the i-th of a text
        self.position = None if config.packing else nn.Parameter(torch.zeros(L, D))
        self.time_s = TimeEmbedding(config.cond_width, config.time_scale)
        self.time_t = TimeEmbedding(config.cond_width, config.time_scale) if two_times else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, bias=False)
        self.modulation = nn.Linear(config.cond_width, 2 * D)
        self.head = nn.Linear(D, V)
        k = D // config.heads // 2
        frequencies = 10000 ** -(torch.arange(k) / k)
        angles = torch.arange(L)[:, None] * frequencies  # rotary embedding
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        # blocks add 0 at first, as their output layers are 0; all tokens start equally likely
        zero = [self.modulation, self.head]
        for block in self.blocks:
            zero += [block.modulation, block.out, block.mlp[2]]
        if two_times:
            zero.append(self.time_t.mlp[2])  # time_t adds 0: a map starts equal to its flow
        for layer in zero:
            for p in layer.parameters():
                nn.init.zeros_(p)
        for block in self.blocks:  # gates of 1: with the paper's gates of 0, blocks learn late
            block.modulation.bias.data.view(6, D)[2::3] = 1

    def noise(self, B, generator=None):
        """[FLM] B states of noise, x0 W with x0 ~ N(0, I), (B, L, D). At each position, x0 W is
        normal with covariance W^T W, and so is z C^T with z ~ N(0, I) in R^D and C C^T = W^T W.
        If V > D, z C^T is drawn, as it is cheaper. Both have a gradient with respect to W."""
        W = self.embedding
        V, D = W.shape
        device = generator.device if generator else W.device
        shape = B, self.config.seq_len, min(V, D)
        z = torch.randn(shape, generator=generator, device=device).to(W.device)
        return z @ W if V <= D else z @ self.factor().T

    def factor(self):
        """The Cholesky factor C of W^T W, (D, D). If that is singular: NaN, which ends training."""
        gram = self.embedding.T @ self.embedding
        factor, failed = torch.linalg.cholesky_ex(gram)  # cholesky would synchronise a GPU
        return factor.where(failed == 0, math.nan)

    def clean(self, tokens_or_probs):
        """[FLM] States at t = 1, (B, L, D): x1 W for tokens (B, L), probs W for probs (B, L, V)."""
        if tokens_or_probs.is_floating_point():
            return tokens_or_probs @ self.embedding
        return F.embedding(tokens_or_probs, self.embedding)

    def forward(self, state, tau_s, tau_t=None):
        """Logits (B, L, V), float32, of D_s, given states (B, L, D) at time tau_s = tau(s), (B,).
        With a second time tau_t (B,), for a flow map: of delta_{s,t}, see distill.py."""
        L = state.shape[1]
        cond = self.time_s(tau_s)
        if tau_t is not None:
            cond = cond + self.time_t(tau_t)
        cond = F.silu(cond)
        x = state
        if self.config.state_norm:
            x = F.layer_norm(x, x.shape[-1:])  # x0 W is about sqrt(V) times as large as x1 W
        if self.position is not None:
            x = x + self.position[:L]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                x = block(x, cond, self.cos[:L], self.sin[:L])  # x stays float32
            shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
            logits = self.head(self.norm(x) * (1 + scale) + shift).float()
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

# --------------------------------------------------------------------------------- 5. Settings
def setting(group, default, help, choices=None):
    """A field of Config, and its flag."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices))

of_network = partial(setting, "network")  # a map has those of its flow, but dropout 0
of_training = partial(setting, "training")
of_command = partial(setting, "command")  # not saved in checkpoints, nor is the group "start"

@dataclass
class Config:
    """All settings. Network and training: by default the paper's for lm1b; PRESETS adapt them."""

    tokenizer: str = of_network("bert-base-uncased", "kind of tokens", data.TOKENIZERS)
    vocab_size: int = of_network(4096, "largest size of a bpe vocabulary (V)")
    seq_len: int = of_network(128, "tokens in a row (L)")
    packing: bool = of_network(True, "join documents and cut rows; otherwise pad each document")
    depth: int = of_network(12, "number of blocks")
    width: int = of_network(768, "width of the network (D)")
    heads: int = of_network(12, "attention heads")
    cond_width: int = of_network(128, "width of the time embedding")
    time_scale: float = of_network(1.0, "factor on tau; the paper's 1 hardly varies the sinusoids")
    dropout: float = of_network(0.1, "dropout rate on the residual branches")
    condition_prob: float = of_network(0.0, "share of training rows with known tokens, for prompts")
    state_norm: bool = of_network(False, "normalise the states in the network")
    logit_cap: float = of_network(30.0, "soft cap on the logits; 0: none")
    attention_cap: float = of_network(0.0, "soft cap on attention scores, for released models")

    dataset: str = of_training("sentences", "sentences, words, sotu, lm1b, owt or a text file")
    data_dir: str = of_training("", "local copy of lm1b or owt")
    max_steps: int = of_training(1_000_000, "training steps")
    batch_size: int = of_training(512, "rows per step, over all processes")
    micro_batch_size: int = of_training(0, "largest number of rows per forward pass; 0: automatic")
    optimizer: str = of_training("adamw", "muon: for the matrices of blocks", ("adamw", "muon"))
    lr: float = of_training(3e-4, "learning rate")
    beta2: float = of_training(0.999, "of AdamW")
    warmup: int = of_training(2500, "steps of learning-rate warm-up")
    decay: float = of_training(0.0, "share of the steps with learning-rate decay, at the end")
    ema: float = of_training(0.9999, "decay of the moving average of the weights")
    eval_every: int = of_training(5000, "steps between evaluations")
    seed: int = of_training(0, "seed of weights, data order and noise")
    init_from: str = setting("start", "", "an flm.pt: start with its network, weights, tokenizer")

    run_dir: str = of_command("", "folder of the run (default: runs/DATASET)")
    device: str = of_command("auto", "device of the network", ("auto", "cpu", "cuda", "mps"))
    bf16: bool | None = of_command(None, "bfloat16 matrix products (default: on CUDA only)")
    compile: bool | None = of_command(None, "torch.compile (default: on CUDA only)")
    resume: bool = of_command(False, "continue the run in the folder, if there is one")
    overwrite: bool = of_command(False, "replace the run in the folder")
    sample: bool = of_command(False, "write texts to stdout instead of training")
    sample_steps: int = of_command(64, "network evaluations per text")
    num_samples: int = of_command(16, "number of texts")
    temperature: float = of_command(1.0, "divides the logits; below 1: more probable texts")
    prompt: str = of_command("", "beginning of the texts, or text with gaps: I [MASK] you.")

    def saved(self, groups=("network", "training")):  # in checkpoints
        names = [f.name for f in fields(self) if f.metadata["group"] in groups]
        return {name: getattr(self, name) for name in names}

SMALL = dict(depth=4, width=128, heads=4, cond_width=64, time_scale=100.0, dropout=0.0,
             logit_cap=0.0, condition_prob=0.2, state_norm=True, tokenizer="bpe", optimizer="muon",
             lr=1e-2, warmup=100, decay=1.0, ema=0.99, eval_every=500)
PRESETS = {
    "sentences": SMALL | dict(seq_len=18, packing=False, batch_size=32, max_steps=3200, lr=7e-3),
    "words": SMALL | dict(tokenizer="chars", seq_len=16, packing=False, width=96, heads=3,
                          batch_size=128, max_steps=1150, eval_every=400),
    "sotu": SMALL | dict(seq_len=64, batch_size=32, max_steps=2000, condition_prob=0.0),
    "lm1b": {},
    "owt": dict(tokenizer="gpt2", seq_len=1024),
    "a text file": SMALL | dict(vocab_size=2048, seq_len=32, batch_size=64, max_steps=1500),
}

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

def parse(argv, config_type, doc, groups=("network", "training", "start", "command")):
    """The settings that a command line gives, and no others, by name. Raises UserError."""
    parser = Parser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_type):
        if f.metadata["group"] in groups:
            kind = dict(type=f.type, choices=f.metadata["choices"])
            if f.type in (bool, bool | None):
                kind = dict(action=argparse.BooleanOptionalAction)
            parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **kind)
    return vars(parser.parse_args(argv))

def check(config):
    """Raises UserError for settings that are out of range or do not fit together."""
    may_be_zero = "micro_batch_size", "warmup", "seed"
    may_exceed_1 = "time_scale", "logit_cap", "attention_cap", "temperature"
    for f in fields(config):
        if f.type in (int, float):
            least = 0 if f.type is float or f.name in may_be_zero else 1
            most = 2**31 - 1 if f.type is int or f.name in may_exceed_1 else 1
            if not least <= getattr(config, f.name) <= most:
                raise UserError(f"--{f.name.replace('_', '-')}: must be from {least} to {most}")
    if config.temperature == 0 or config.beta2 == 1:
        raise UserError("--temperature must be greater than 0, --beta2 less than 1")
    if config.width % (2 * config.heads):
        raise UserError(f"--width {config.width}: must be a multiple of 2 * --heads")
    if config.batch_size % world():
        raise UserError(f"--batch-size {config.batch_size}: not a multiple of {world()} processes")
    if config.prompt and not config.sample:
        raise UserError("--prompt: works only with --sample; add it")

# -------------------------------------------------------------------------------- 6. Optimizer
class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, for matrices (Jordan et al. 2024): torch.optim.Muon
    with adjust_lr_fn="match_rms_adamw", without weight decay and in float32, as most CPUs are slow
    in bfloat16. A parameter may be a stack of matrices: qkv.weight is three."""

    def __init__(self, params, lr, beta=0.95, stacked=1):
        super().__init__(params, dict(lr=lr, beta=beta, stacked=stacked))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = []
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                update = p.grad.lerp(momentum, group["beta"])  # Nesterov
                updates.append(update.view(group["stacked"], -1, p.shape[1]))
            updates = orthogonalise(torch.cat(updates))  # one batch is faster than many matrices
            # an orthogonal update has RMS 1 / sqrt(max(rows, columns)); scaled to 0.2, as AdamW
            scale = 0.2 * math.sqrt(max(updates.shape[1:]))
            for p, update in zip(group["params"], updates.split(group["stacked"])):
                p.sub_(update.view(p.shape), alpha=scale * group["lr"])

def orthogonalise(G):
    """Brings the singular values s of each G (n, rows, columns) near 1 (.7 to 1.2): divides by the
    norm of G, then replaces s by 3.4445 s - 4.7750 s^3 + 2.0315 s^5 five times (Jordan)."""
    tall = G.shape[1] > G.shape[2]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = X @ X.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, poly, X, beta=3.4445)  # 3.4445 X + poly X
    return X.mT if tall else X

def make_optimizers(model, config):
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
    groups = []
    blocks = model.blocks
    if config.optimizer == "muon":  # a group has matrices of one shape
        groups = [dict(params=[block.qkv.weight for block in blocks], stacked=3),
                  dict(params=[block.out.weight for block in blocks]),
                  dict(params=[block.mlp[0].weight for block in blocks]),
                  dict(params=[block.mlp[2].weight for block in blocks])]
    for_muon = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in for_muon]
    adamw = torch.optim.AdamW(rest, config.lr, (0.9, config.beta2), weight_decay=0, fused=True)
    return [adamw, Muon(groups, config.lr)] if groups else [adamw]

def get_lr(step, config):
    """Linear warm-up, constant, then linear decay over the last decay * max_steps steps."""
    rise = (step + 1) / config.warmup if config.warmup else 1
    fall = (1 - step / config.max_steps) / config.decay if config.decay else 1
    return config.lr * min(rise, fall, 1)

# ------------------------------------------------------------------- 7. Processes and checkpoints
def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def setup(config):
    """Starts the process group under torchrun; returns the device. Raises UserError."""
    torch.set_flush_denormal(True)  # products of denormal numbers are 30 times slower
    torch.empty(2**25 - 2**13, dtype=torch.uint8)  # glibc then keeps 64 MiB that are freed later
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = best if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", best.type):
        raise UserError(f"--device {config.device}: not available here; use --device cpu")
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        dist.init_process_group()
    return device

FORMAT = 4  # version of the checkpoints

def save_checkpoint(path, content):
    """Replaces the checkpoint, completely or not at all. Raises UserError."""
    part = path.with_suffix(".part")
    try:
        torch.save(content | dict(format=FORMAT), part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: mend this, then use --resume: {error!s:.200}") from None

def load_checkpoint(path):
    """The content of a checkpoint: plain values and tensors; no code in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError("written by another version")
        return content
    except Exception as error:
        raise UserError(f"{path}: no checkpoint; check the path, or train one ({error})") from None

FlowMap = partial(Transformer, two_times=True)
NETWORKS = dict(flm=Transformer, fmlm=FlowMap)  # a kind K has files K.pt

def build(config, tokenizer, device, bf16=None, network=Transformer):
    """A new network, whose weights are a function of the seed. bf16: None is True on CUDA."""
    torch.manual_seed(config.seed)
    model = network(config, tokenizer.vocab_size).to(device)
    model.tokenizer = tokenizer
    model.bf16 = device.type == "cuda" if bf16 is None else bf16
    return model

def load(path, device="cpu", bf16=None, networks=NETWORKS):
    """The model of a file, with its averaged weights. networks: by kind. Raises UserError."""
    content = load_checkpoint(Path(path))
    config = Config(**{name: content["config"][name] for name in Config().saved()})
    tokenizer = data.Tokenizer(content["tokenizer"])
    model = build(config, tokenizer, torch.device(device), bf16, networks[content["kind"]])
    model.load_state_dict(content["average"])
    return model.eval().requires_grad_(False)

# --------------------------------------------------------------------------------- 8. Training
@torch.no_grad()
def estimate_loss(model, loss, corpus, rows=1024):
    """Held-out loss in nats, and its mean in each tenth of tau (NaN: no row), with fixed noise."""
    results = []
    numbers = torch.arange(min(rows, corpus.rows("heldout")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in numbers.split(forward_rows(model)):
            tokens = corpus.batch("heldout", part.numpy())
            results.append(loss(model, tokens.to(model.embedding.device)))
    nats, tau = (torch.cat(column).cpu() for column in zip(*results))
    by_tau = [nats[(10 * tau).int() == tenth].mean().item() for tenth in range(10)]
    return nats.mean().item(), by_tau

# A step of the default training: B = 32, L = 18, D = 128, V = 4096  10^6 multiplications in matmuls
#   tokens (32, 18), tau (32,)   rows of the text, and their times                                 0
#   x0 (32, 18, 128)             W^T W 67, its Cholesky factor C 1, z C^T 9                       77
#   x1, state (32, 18, 128)      rows of W; (1-t) x0 + t x1                                        0
#   cond (32, 64)                embedding of tau                                                  1
#   x (32, 18, 128)              4 times: qkv 28, attention 3, out 9, MLP 75, modulation 2     470
#   logits (32, 18, 4096)        head                                                            302
#   gradients                    about twice as many as above                                  1,690
#   updates of the matrices      Muon: five Newton-Schulz steps for each                       1,260
def train(model, loss, corpus, config, path, sample):
    """Minimises loss(model, tokens) -> (loss (B,), tau (B,)); returns the averaged model.

    Evaluates the model and writes a checkpoint to path, FOLDER/KIND.pt, every eval_every steps or
    ten minutes. Without --resume, deletes an old one. sample: as `sample` above. Raises UserError.
    """
    device = model.embedding.device
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, config)
    first, log = 0, []
    if config.resume and os.path.exists(path):
        first, log = resume(path, model, average, optimizers, corpus)
    elif rank() == 0:
        path.unlink(missing_ok=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    weights, averages = list(model.train().parameters()), list(average.parameters())
    report(f"matrix products in bfloat16: {model.bf16}; {world()} x {device}")
    if config.compile or (config.compile is None and device.type == "cuda"):
        model.compile()
    # this process trains on `local` rows of each batch, at most `micro` of them at a time
    local = config.batch_size // world()
    micro = config.micro_batch_size or forward_rows(model)
    start = time.monotonic() - (log[-1]["seconds"] if log else 0)
    saved_at = time.monotonic()
    bar = tqdm(range(first, config.max_steps), initial=first, total=config.max_steps,
               disable=rank() > 0 or None, mininterval=1)  # None: if stderr is no terminal
    for step in bar:
        lr = get_lr(step, config)
        for group in groups:
            group["lr"] = lr
        # a resumed run draws the same random numbers, if processes and `micro` are the same
        torch.manual_seed((config.seed * 10**7 + step) * world() + rank())
        # loss and gradient: sums over micro-batches, then over processes
        mean = torch.zeros((), device=device)
        row = step * config.batch_size + rank() * local  # may exceed the corpus: a new epoch
        for rows in torch.arange(row, row + local).split(micro):
            tokens = corpus.batch("train", rows.numpy(), config.seed).to(device)
            part = loss(model, tokens)[0].sum() / config.batch_size
            part.backward()
            mean += part.detach()
        if world() > 1:
            for x in [mean, *(w.grad for w in weights if w.requires_grad)]:
                dist.all_reduce(x)

        # update of the weights, then of their average, whose decay grows from .1 to config.ema
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - ema)
        done = step + 1
        late = time.monotonic() - saved_at > 600
        save = late or done % config.eval_every == 0 or done == config.max_steps
        if rank() == 0 and (done % 20 == 0 or save):
            entry = dict(step=done, loss=mean.item(), lr=lr, seconds=time.monotonic() - start)
            if not math.isfinite(entry["loss"] + norm.item()):
                raise UserError(f"the loss of step {done} is not a number; use the same flags with "
                                "--resume and a smaller --lr")
            log.append(entry)
            bar.set_postfix_str(f"loss {entry['loss']:.3f}")
        if rank() == 0 and save:
            heldout, by_tau = estimate_loss(average, loss, corpus)
            texts = to_lines(average, sample(average, 4, config.sample_steps, config.seed))
            log[-1] |= dict(heldout=heldout, by_tau=by_tau, samples=texts)
            save_checkpoint(path, dict(
                kind=path.stem, step=done, log=log, config=config.saved(),
                source=corpus.meta["source"], tokenizer=model.tokenizer.content,
                model=model.state_dict(), average=average.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers]))
            saved_at = time.monotonic()
            report(f"step {done}: held-out loss {heldout:.4f}", *texts)
    return average

def resume(path, model, average, optimizers, corpus):
    """Loads an interrupted run; returns its step and log. Raises UserError."""
    content = load_checkpoint(path)
    if "model" not in content:  # as in pretrained
        raise UserError(f"{path}: no optimizer state; use a new --run-dir (flows: or --init-from)")
    text = corpus.meta["source"], corpus.tokenizer.content
    if (content["source"], content["tokenizer"]) != text:
        raise UserError(f"{path}: of another text; pass that text as --dataset, or --overwrite")
    try:
        model.load_state_dict(content["model"])
        average.load_state_dict(content["average"])
        for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
            present = optimizer.state_dict()  # with the beta2 of the command line
            optimizer.load_state_dict(present | dict(state=state["state"]))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--resume: other network or optimizer; omit its flags ({error})") from None
    return content["step"], content["log"]

def report(title, *lines, final=False):
    """Prints to stderr, above the progress bar, or to stdout if final; only the first process."""
    if rank() == 0:
        tqdm.write("\n    ".join([title, *lines]), file=sys.stdout if final else sys.stderr)

# ----------------------------------------------------------------------------- 9. Command line
def to_lines(model, tokens):
    """Decodes tokens (n, L): one line per text. A padded text ends before its first end token."""
    lines, end = [], model.tokenizer.end
    for ids in tokens.tolist():
        if not model.config.packing and end in ids:
            ids = ids[: ids.index(end)]
        lines.append(data.printable(model.tokenizer.decode(ids)))
    return lines

def parse_prompt(model, text):
    """Known tokens (L,) of a prompt, -1 where unknown. Raises UserError.

    A gap is [MASK] for one token, or _ for one character. In a padded row, a prompt with gaps is a
    whole text, and one without gaps is a beginning. In a packed row, the begin token precedes it.
    """
    tokenizer, L, padded = model.tokenizer, model.config.seq_len, not model.config.packing
    text = text.encode(errors="ignore").decode()  # without bytes that are not UTF-8
    gap = "_" if tokenizer.kind == "chars" else r" ?\[MASK\]"  # a token may start with a space
    first, *others = tokenizer.encode(re.split(gap, text))
    ids = first if padded or tokenizer.begin is None else [tokenizer.begin, *first]
    for part in others:
        ids += [-1, *part]
    if len(ids) >= L:
        raise UserError(f"--prompt {text}: has {len(ids)} tokens; {L - 1} fit; shorten it")
    rest = tokenizer.end if padded and others else -1
    return torch.tensor(ids + [rest] * (L - len(ids)))

def write_samples(config, path, sample, networks=NETWORKS, **options):
    """--sample: prints texts of the model at path, one per line. Raises UserError."""
    device = setup(config)
    check(config)
    model = load(path, device, config.bf16, networks)
    if config.prompt:
        if path.stem in ("flm", "fmlm") and not model.config.condition_prob:  # not for extras
            raise UserError("--prompt: needs a flow that was trained with --condition-prob .2")
        options["known"] = parse_prompt(model, config.prompt)
    tokens = sample(model, config.num_samples, config.sample_steps, config.seed,
                    config.temperature, **options)
    if rank() == 0:
        print("\n".join(to_lines(model, tokens)))

def open_run(config, path):
    """Prepares a training; returns its device and corpus. Raises UserError."""
    device = setup(config)
    check(config)
    if os.path.exists(path) and not (config.resume or config.overwrite):
        raise UserError(f"{path}: exists; use --resume, --overwrite or another --run-dir")
    corpus = data.prepare(config.dataset, config.tokenizer, config.seq_len, config.packing,
                          config.vocab_size, config.data_dir)
    report(f"{config.dataset}: {corpus.describe()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--run-dir {path.parent}: {error.strerror}; use another one") from None
    return device, corpus

def run(main):
    """Runs main(argv). A mistake of the user ends it with one line on stderr and status 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # its reader has left, as in "| head"
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.exit(1)
    except UserError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def main(argv):
    given = parse(argv, Config, __doc__)
    dataset = given.get("dataset", Config.dataset)
    config = Config(**(PRESETS.get(dataset, PRESETS["a text file"]) | given))
    folder = Path(config.run_dir or Path("runs", Path(dataset).stem or "text"))
    path = folder / "flm.pt"
    if config.sample:
        return write_samples(config, path, sample)
    start = None
    if config.resume and os.path.exists(path):  # the saved settings; the command line replaces them
        config = Config(**(load_checkpoint(path)["config"] | given))
    elif config.init_from:
        start = load_checkpoint(config.init_from)
        network = {name: start["config"][name] for name in config.saved(["network"])}
        if start["kind"] != "flm" or given.keys() & network.keys():
            raise UserError("--init-from: needs an flm.pt and no flags of the network; omit them")
        network["tokenizer"] = start["tokenizer"]  # its content, instead of its kind
        config = replace(config, **network)
    device, corpus = open_run(config, path)
    model = build(config, corpus.tokenizer, device, config.bf16)
    if start:
        model.load_state_dict(start["average"])
    if rank() == 0 and config.overwrite and not config.resume:
        (folder / "fmlm.pt").unlink(missing_ok=True)  # the map of the flow that is replaced
    model = train(model, flow_loss, corpus, config, path, sample)
    for steps in (1, 4, 16, 64):
        texts = to_lines(model, sample(model, 8, steps, config.seed))
        report(f"steps: {steps}", *texts, final=True)

if __name__ == "__main__":
    run(main)
