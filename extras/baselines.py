"""Baselines with the network of the flow: an autoregressive model and masked diffusion.

    python -m extras.baselines --model mdlm                # runs/sentences/mdlm.pt beside flm.pt
    python -m extras.baselines --model ar --run-dir runs/my
    python -m extras.baselines --sample --model mdlm --sample-steps 8 --temperature 0.8

ar predicts each token from the tokens before it. mdlm, masked diffusion (Sahoo et al. 2024, arXiv
2406.07524), predicts masked tokens. At time tau, a token is unmasked with probability tau.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import distill
import flm
from data import UserError

class Baseline(flm.Transformer):
    """The flow's network, with another start, as the flow's is a saddle point of mdlm_loss.
    `blank` (D,) is the input of the first position of ar, and of a masked position of mdlm."""

    def __init__(self, config, V):
        super().__init__(config, V)
        nn.init.normal_(self.embedding, std=0.6)
        nn.init.normal_(self.head.weight, std=0.1)
        self.blank = nn.Parameter(0.6 * torch.randn(config.width))
        for block in self.blocks:
            block.cap = 0  # only released checkpoints need it

class AR(Baseline):
    """The input at position i is the token at i - 1."""

    def __init__(self, config, V):
        super().__init__(config, V)
        self.attend(causal)

    def attend(self, attention):  # attention(block, q, k, v) replaces that of all blocks
        for block in self.blocks:
            block.attend = partial(attention, block)

def causal(block, q, k, v):
    """Causal flm.Block.attend: q, k, v (B, heads, L, head width) -> the same shape."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

def ar_nats(model, tokens):
    """-log p(token | tokens before it) in nats, (B, L), of tokens (B, L)."""
    B = len(tokens)
    before = model.clean(tokens[:, :-1])
    state = torch.cat([model.blank.expand(B, 1, -1), before], dim=1)
    tau = torch.zeros(B, device=tokens.device)
    return flm.cross_entropy(model(state, tau), tokens)

def ar_loss(model, tokens):
    """The training loss of ar: tokens (B, L) -> nats per position (B,), tau = 0 (B,)."""
    nats = ar_nats(model, tokens).mean(1)
    return nats, torch.zeros_like(nats)

@torch.no_grad()
def ar_sample(model, n, steps, seed, temperature=1.0, known=None):
    """Writes n texts in L evaluations, whatever `steps` is: tokens (n, L). known: without gaps."""
    texts = []
    generator = torch.Generator().manual_seed(seed)
    for known_rows in flm.batches(model, n, known):
        unknown = (known_rows < 0).int()
        if unknown.diff().min() < 0:  # a known token after an unknown one
            raise UserError("--prompt: ar continues a beginning and fills no gaps; remove them")
        texts.append(write_batch(model, known_rows, temperature, generator))
    model.attend(causal)
    return torch.cat(texts).cpu()

def write_batch(model, known, temperature, generator):
    """Texts (B, L), token by token, with the keys and values of earlier positions in a cache."""
    B, L = known.shape
    tau = torch.zeros(B, device=known.device)
    state = model.blank.expand(B, 1, -1)
    tokens = []
    past = defaultdict(list)  # keys and values of each block

    def cached(block, q, k, v):
        # the network gives a single position the rotary angle 0, which has no effect
        qk = torch.stack([q, k])
        q, k = flm.rotate(qk, model.cos[i], model.sin[i]).to(v.dtype)
        past[block].append(torch.stack([k, v]))
        keys, values = torch.cat(past[block], dim=3)
        return flm.Block.attend(block, q, keys, values)

    model.attend(cached)
    for i in range(L):
        logits = model(state, tau)[:, 0]
        token = draw(logits / temperature, generator)
        token = torch.where(known[:, i] < 0, token, known[:, i])
        tokens.append(token)
        state = model.clean(token[:, None])
        if model.position is not None:  # forward adds the first; L rolls restore it
            model.position.data = model.position.data.roll(-1, 0)
    return torch.stack(tokens, dim=1)

def draw(logits, generator):
    """Draws tokens (n,) from logits (n, V), on the CPU."""
    probs = logits.softmax(-1).cpu()
    return probs.multinomial(1, generator=generator)[:, 0].to(logits.device)

def mask(model, tokens, masked):
    """The state (B, L, D) of tokens (B, L), of which some are masked (B, L)."""
    return torch.where(masked[..., None], model.blank, model.clean(tokens))

def mdlm_loss(model, tokens):
    """The training loss of mdlm: a bound on -log p in nats per position (B,), and tau (B,)."""
    tau = flm.uniform_times(len(tokens), tokens.device)
    masked = torch.rand(tokens.shape, device=tokens.device) >= tau[:, None]
    state = mask(model, tokens, masked)
    nats = flm.cross_entropy(model(state, tau), tokens)
    prob = (1 - tau).clamp(min=1e-6)  # of a mask; tau may round to 1
    return (nats * masked).mean(1) / prob, tau

@torch.no_grad()
def mdlm_sample(model, n, steps, seed, temperature=1.0, known=None):
    """Writes n texts in `steps` evaluations: tokens (n, L). Unmasks each token at a random time."""
    texts = []
    generator = torch.Generator().manual_seed(seed)
    for tokens in flm.batches(model, n, known):
        times = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        times = torch.where(tokens < 0, times, -1)
        tokens = tokens.clamp(min=0)
        taus = torch.linspace(0, 1, steps + 1).tolist()
        for tau, tau_next in zip(taus, taus[1:]):
            masked = times >= tau
            new = masked & (times < tau_next)
            unmasked = 1 - masked.float().mean(1)  # on average, this share is tau
            logits = model(mask(model, tokens, masked), unmasked)
            tokens[new] = draw(logits[new] / temperature, generator)
        texts.append(tokens.cpu())
    return torch.cat(texts)

NETWORKS = flm.NETWORKS | dict(ar=AR, mdlm=Baseline)
LOSSES = dict(ar=ar_loss, mdlm=mdlm_loss)
SAMPLERS = dict(ar=ar_sample, mdlm=mdlm_sample)
LR = dict(  # the best of three
    ar=dict(sentences=1e-2, words=6e-3, sotu=1e-2),
    mdlm=dict(sentences=4e-3, words=3e-3, sotu=5e-3))
load = partial(flm.load, networks=NETWORKS)  # of all four kinds

@dataclass
class Config(flm.Config):  # the settings of the network are the flow's and are no flags
    model: str = flm.setting("training", "mdlm", "kind of baseline", tuple(LOSSES))
    run_dir: str = flm.setting("command", "runs/sentences", "folder of the flow")

def main(argv):
    given = flm.parse(argv, Config, __doc__, groups=("training", "command"))
    kind = given.get("model", Config.model)
    path = Path(given.get("run_dir", Config.run_dir), f"{kind}.pt")
    if given.get("sample"):
        return flm.write_samples(Config(**given), path, SAMPLERS[kind], NETWORKS)
    presets = {name: dict(lr=lr) for name, lr in LR[kind].items()}
    config, _, device, corpus = distill.follow_flow(Config, given, path, presets)
    model = flm.build(config, corpus.tokenizer, device, config.bf16, NETWORKS[kind])
    flm.train(model, LOSSES[kind], corpus, config, path, SAMPLERS[kind])

if __name__ == "__main__":
    flm.run(main)
