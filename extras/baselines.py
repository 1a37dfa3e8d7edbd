"""Baselines with the network of the flow: an autoregressive model and masked diffusion.

    python -m extras.baselines --model mdlm                # runs/sentences/mdlm.pt beside flm.pt
    python -m extras.baselines --model ar --run-dir runs/my
    python -m extras.baselines --sample --model mdlm --sample-steps 8 --temperature 0.8

ar    predicts each token from the tokens before it. Sampling takes L evaluations of one position.
mdlm  masked diffusion (Sahoo et al. 2024, arXiv 2406.07524): predicts masked tokens from the
      unmasked ones. At time tau a token is unmasked with probability tau (log-linear schedule).
Settings that are not given are those of the flow, except for the learning rates in LR.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import flm

class Baseline(flm.Transformer):
    """A flow's network with another initialisation: the flow's is a saddle point of mdlm_loss."""

    def __init__(self, config, V):
        super().__init__(replace(config, condition_prob=0.0), V)
        self.takes_prompts = True  # in sampling; training needs no prompts
        nn.init.normal_(self.embedding, std=0.6)
        nn.init.normal_(self.head.weight, std=0.1)
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.mlp[2].weight)
            gates = block.modulation.bias.data.view(6, -1)[2::3]
            gates[:] = 1

class AR(Baseline):
    """The input at position i is the token at i - 1, and `begin` at the first position."""

    def __init__(self, config, V):
        super().__init__(config, V)
        self.begin = nn.Parameter(0.6 * torch.randn(config.width))
        self.attend(causal)

    def attend(self, attention):
        """Replaces the attention of all blocks by attention(block, q, k, v)."""
        for block in self.blocks:
            block.attend = partial(attention, block)

def causal(block, q, k, v):
    """Causal flm.Block.attend: q, k, v (B, heads, L, head width) -> the same shape."""
    if not block.cap:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = block.cap * torch.tanh(scores / block.cap)
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ v

def ar_nats(model, tokens):
    """-log p(token | tokens before it) in nats, (B, L), of tokens (B, L)."""
    begin = model.begin.expand(len(tokens), 1, -1)
    before = model.clean(tokens[:, :-1])
    tau = torch.zeros(len(tokens), device=model.device)
    logits = model(torch.cat([begin, before], dim=1), tau)
    return flm.cross_entropy(logits, tokens)

def ar_loss(model, tokens, rows):
    """The training loss of ar: tokens (B, L) -> nats per position (B,), tau = 0 (B,)."""
    nats = ar_nats(model, tokens).mean(1)
    return nats, torch.zeros_like(nats)

def ar_sample(model, n, steps, seed, temperature=1.0, known=None):
    """Writes n texts in L evaluations: tokens (n, L). Ignores `steps`.

    known: as in flm.sample. A known token affects only the tokens after it.
    """
    def solve(rows, known):
        L = model.config.seq_len
        uniform = rows.uniform((L,), model.device)
        tau = torch.zeros(len(uniform), device=model.device)
        state = model.begin.expand(len(uniform), 1, -1)
        past, tokens = defaultdict(list), []  # past: keys and values of each block

        def cached(block, q, k, v):
            # the network gives a single position the rotary angle 0, which has no effect
            x = torch.stack([q, k])
            q, k = flm.rotate(x, model.cos[i], model.sin[i]).to(v.dtype)
            past[block].append(torch.stack([k, v]))
            keys, values = torch.cat(past[block], dim=3)
            return flm.Block.attend(block, q, keys, values)

        model.attend(cached)
        for i in range(L):
            if model.position is not None:
                state = state + model.position[i] - model.position[0]
            logits = model(state, tau)[:, 0]
            probs = (logits / temperature).softmax(-1)
            token = flm.draw_tokens(probs, uniform[:, i])
            if known is not None:
                token = torch.where(known[:, i] < 0, token, known[:, i])
            tokens.append(token)
            state = model.clean(token[:, None])
        return torch.stack(tokens, dim=1)
    try:
        return flm.in_batches(model, n, seed, solve, known)
    finally:
        model.attend(causal)

class MDLM(Baseline):
    """The input is the embedding of each unmasked token, and `mask` at all other positions."""

    def __init__(self, config, V):
        super().__init__(config, V)
        self.mask = nn.Parameter(0.6 * torch.randn(config.width))

def mdlm_loss(model, tokens, rows):
    """The training loss of mdlm: a bound on -log p in nats per position (B,), and tau (B,)."""
    tau = rows.times(tokens.device)
    uniform = rows.uniform(tokens.shape[1:], tokens.device)
    masked = uniform >= tau[:, None]
    state = torch.where(masked[..., None], model.mask, model.clean(tokens))
    nats = flm.cross_entropy(model(state, tau), tokens) * masked
    # 1 - tau is the probability of a mask; tau may round to 1
    return nats.mean(1) / (1 - tau).clamp(min=1e-6), tau

def mdlm_sample(model, n, steps, seed, temperature=1.0, known=None):
    """Ancestral sampler: writes n texts in `steps` evaluations, tokens (n, L).

    Each token is unmasked at a random time. Tokens of one step are drawn independently. known: as
    in flm.sample; known tokens are never masked.
    """
    def solve(rows, known):
        uniform = rows.uniform((model.config.seq_len, 2), model.device)
        times, uniform = uniform.clamp(max=1 - 1e-7).unbind(-1)  # below 1: all are unmasked
        if known is None:
            known = torch.full_like(times, -1).long()
        times = torch.where(known < 0, times, -1)
        tokens = known.clamp(min=0)
        taus = torch.linspace(0, 1, steps + 1, device=model.device)
        for tau, tau_next in zip(taus, taus[1:]):
            masked = times >= tau
            new = masked & (times < tau_next)
            state = torch.where(masked[..., None], model.mask, model.clean(tokens))
            unmasked = 1 - masked.float().mean(1)  # on average, this share is tau
            logits = model(state, unmasked)[new]
            probs = (logits / temperature).softmax(-1)
            tokens[new] = flm.draw_tokens(probs, uniform[new])
        return tokens
    return flm.in_batches(model, n, seed, solve, known)

NETWORKS = flm.NETWORKS | dict(ar=AR, mdlm=MDLM)
LOSSES = dict(ar=ar_loss, mdlm=mdlm_loss)
SAMPLERS = dict(ar=ar_sample, mdlm=mdlm_sample)
LR = dict(  # chosen among three values
    ar=dict(sentences=1e-2, words=6e-3, sotu=1e-2),
    mdlm=dict(sentences=4e-3, words=3e-3, sotu=5e-3))
load = partial(flm.load, networks=NETWORKS)  # loads flm.pt, fmlm.pt, ar.pt and mdlm.pt

@dataclass
class Config(flm.Config):
    """Settings of a baseline. The settings of data and network are the flow's."""

    model: str = flm.setting("mdlm", "kind of baseline", choices=tuple(LOSSES), group="baseline")

def main(argv):
    kind = flm.parse(argv, Config, __doc__, distill.INHERITED).get("model", "mdlm")
    config, flow, corpus = distill.join_run(
        argv, Config, __doc__, kind,
        lambda flow: dict(lr=LR[kind].get(flow.dataset, flow.lr), embedding_lr=1.0))
    sample = partial(SAMPLERS[kind], temperature=config.temperature)
    if config.sample:
        return flm.write_samples(config, kind, sample, NETWORKS)
    model = flm.build(config, flow.tokenizer, flow.device, config.bf16, NETWORKS[kind])
    flm.train(model, LOSSES[kind], corpus, config, kind, sample)

if __name__ == "__main__":
    flm.run_command(main)
