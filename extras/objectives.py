"""Other objectives for the distillation of a flow map. Writes fmlm.pt, as distill.py does.

    python -m extras.objectives --objective lagrangian --run-dir runs/sentences
    python distill.py --sample --run-dir runs/sentences

distill.py uses the semigroup property: X_{s,t} equals X_{s,u}, followed by X_{u,t}. This program
uses one of these objectives, with b_t the velocity of the flow:
    - lagrangian: the end of a journey follows the flow, d/dt X_{s,t} = b_t(X_{s,t}).
    - eulerian: all points of a trajectory have the same end, d/ds X_{s,t}(x_s) = 0.
    - two-stage: the semigroup property in squared error (version 1 of the paper). A first network
      learns to correct an Euler step; it is saved in fmlm.correction.pt. A flow map then learns
      the corrected steps. Each stage takes --max-steps steps. No prompts.
The first two differentiate the network with respect to time. They are unstable near t = 1, so their
journeys end at tau = .99 or earlier.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import distill
import flm
from data import UserError

def denoise(model, state, *taus):
    """D_s(x) of a flow at tau_s, or delta_{s,t}(x) of a flow map at tau_s and tau_t, (B, L, V)."""
    return model(state, *taus).softmax(-1)

# -------------------------------------- 1. Targets, (B, L, V); the arguments of distill.semigroup
def times(model, *taus):
    """t(tau) of each tau (B,), as (B, 1, 1), below 1: at s = 1 or t = 1, targets would be 0/0."""
    return [t.clamp(max=1 - 1e-6) for t in distill.times(model, *taus)]

def lagrangian(flow, delta, model, state, tau_s, tau_t):
    """delta_{s,t}(x) = D_t(X_{s,t}(x)) - (1-t)(t-s)/(1-s) d/dt delta_{s,t}(x)."""
    def delta_at(t):
        return delta(state, tau_s, model.clock.tau(t))
    s, t = times(model, tau_s, tau_t)
    probs, slope = derivative(delta_at, (t[:, 0, 0],), (torch.ones_like(tau_t),))
    share = (t - s) / (1 - s)
    end = (1 - share) * state + share * model.clean(probs)
    factor = (1 - t) * share
    return to_simplex(denoise(flow, end, tau_t) - factor * slope)

def eulerian(flow, delta, model, state, tau_s, tau_t):
    """delta_{s,t}(x) = D_s(x) + (t-s)(1-s)/(1-t) d/ds delta_{s,t}(x_s), with dx/ds = b_s(x)."""
    def delta_at(s, x):
        return delta(x, model.clock.tau(s), tau_t)
    s, t = times(model, tau_s, tau_t)
    probs = denoise(flow, state, tau_s)
    velocity = (model.clean(probs) - state) / (1 - s)
    tangent = torch.ones_like(tau_s), velocity
    _, slope = derivative(delta_at, (s[:, 0, 0], state), tangent)
    factor = (t - s) * (1 - s) / (1 - t)
    return to_simplex(probs + factor * slope)

def derivative(f, at, tangent):
    """f(*at) and its derivative along `tangent`. Fused attention does not support jvp."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, at, tangent)

def to_simplex(target):
    """Probabilities from numbers that sum to 1: sets negative ones to 0, then rescales."""
    positive = target.clamp(min=0)
    return positive / positive.sum(-1, keepdim=True)

# ----------------------------------------------------------------------------------- 2. Two stages
class Correction(flm.Transformer):
    """g_{s,t} of the first stage: X_{s,t}(x) = x + (t-s) b_s(x) + (t-s)^2/2 g_{s,t}(x)."""

    def __init__(self, config, V):
        config = replace(config, logit_cap=0.0)  # g reaches hundreds
        super().__init__(config, V, two_times=True)
        self.log_weight = nn.Parameter(torch.zeros(10))  # log of the error by tenth of tau_s

def corrected(flow, correction, state, tau_s, tau_t):
    """delta_{s,t} = D_s + (1-s)(t-s)/2 g_{s,t} of a corrected step, (B, L, V). It sums to 1."""
    s, t = times(flow, tau_s, tau_t)
    g = correction(state, tau_s, tau_t)
    g = g - g.mean(-1, keepdim=True)
    factor = (1 - s) * (t - s) / 2
    return denoise(flow, state, tau_s) + factor * g

def squared_error(model, tokens, delta, target):
    """|X - X'|^2 in V dimensions, with X the map of `delta` and X' the map of `target`.

    No gradient flows through X'. Returns the mean error over positions (B,), and tau_s (B,).
    """
    tau_s, tau_t = distill.draw_journeys(len(tokens), tokens.device)
    s, t = times(model, tau_s, tau_t)
    noise = model.noise(len(tokens))
    state = (1 - s) * noise + s * model.clean(tokens)
    with torch.no_grad():
        probs = target(state, tau_s, tau_t)
    share = (t - s) / (1 - s)
    error = share * (delta(state, tau_s, tau_t) - probs)
    return error.square().sum(-1).mean(1), tau_s

def correction_loss(flow, model, tokens):
    """First stage, loss (B,) and tau_s (B,): corrected steps obey the semigroup property.

    The loss is exp(-w) error + w, with a learned w for each tenth of tau_s.
    """
    delta = partial(corrected, flow, model)
    target = partial(distill.semigroup, delta, model)
    error, tau_s = squared_error(model, tokens, delta, target)
    tenth = (10 * tau_s).long().clamp(max=9)
    w = model.log_weight[tenth]
    return error * torch.exp(-w) + w, tau_s

def regression_loss(flow, correction, model, tokens):
    """Second stage, loss (B,) and tau_s (B,): a flow map learns the corrected steps."""
    target = partial(corrected, flow, correction)
    return squared_error(model, tokens, partial(denoise, model), target)

def sample_correction(flow, correction, n, steps, seed):
    """Writes n texts in one corrected step from noise to data: tokens (n, L). Ignores `steps`."""
    state = correction.noise(n, torch.Generator().manual_seed(seed))
    tau_s = torch.zeros(n, device=state.device)
    probs = corrected(flow, correction, state, tau_s, tau_s + 1)
    unknown = torch.full(state.shape[:2], -1, device=state.device)
    return flm.most_probable(correction, probs, unknown).cpu()

# --------------------------------------------------------------------------------- 3. Command line
TARGETS = dict(lagrangian=lagrangian, eulerian=eulerian)

@dataclass
class Config(flm.Config):
    """Settings of a distillation. Those of the network are the flow's and are no flags."""

    objective: str = flm.setting("training", "two-stage", "see above", ("two-stage", *TARGETS))
    run_dir: str = flm.setting("command", "runs/sentences", "folder of the flow")
    sample_steps: int = flm.setting("command", 1, "network evaluations per text")

def make_student(network, config, corpus, device, weights):
    """A network with two times. It starts with those of its weights that are given."""
    model = flm.build(config, corpus.tokenizer, device, config.bf16, network)
    model.load_state_dict(weights, strict=False)
    model.embedding.requires_grad_(False)  # flow and student have the same states
    return model

def main(argv):
    given = flm.parse(argv, Config, __doc__, groups=("training", "command"))
    if given.get("sample"):
        raise UserError("--sample: use python distill.py --sample")
    path = Path(given.get("run_dir", Config.run_dir), "fmlm.pt")
    flow_path = path.with_name("flm.pt")
    first_path = path.with_name("fmlm.correction.pt")
    latest = path
    if first_path.exists() and not path.exists():
        latest = first_path  # of a run that ended in its first stage
    config, _, device, corpus = distill.follow_flow(
        Config, given, latest, distill.PRESETS, beta2=0.95, dropout=0.0)
    flow = flm.load(flow_path, device, config.bf16)
    if not config.resume:
        first_path.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if config.objective == "two-stage":
        config.condition_prob = 0.0
        weights = flow.state_dict()
        del weights["head.weight"], weights["head.bias"]  # the correction starts at g = 0
        correction = make_student(Correction, config, corpus, device, weights)
        loss = partial(correction_loss, flow)
        sample = partial(sample_correction, flow)
        correction = flm.train(correction, loss, corpus, config, first_path, sample)
        loss = partial(regression_loss, flow, correction)
    else:
        config.compile = False  # torch.func.jvp needs an uncompiled network
        target = partial(TARGETS[config.objective], flow)
        draw = partial(distill.draw_journeys, latest=0.99, ends=0)
        loss = partial(distill.map_loss, flow, target=target, draw=draw)
    model = make_student(flm.FlowMap, config, corpus, device, flow.state_dict())
    flm.train(model, loss, corpus, config, path, distill.sample)

if __name__ == "__main__":
    flm.run(main)
