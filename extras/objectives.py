"""Other objectives for the distillation of a flow map. Writes fmlm.pt, as distill.py does.

    python -m extras.objectives --objective lagrangian --run-dir runs/sentences
    python distill.py --sample --run-dir runs/sentences

distill.py uses the semigroup property: X_{s,t} equals X_{s,u}, followed by X_{u,t}. This program
uses one of these objectives, with b_t the velocity of the flow:
    - lagrangian: the end of a journey follows the flow, d/dt X_{s,t} = b_t(X_{s,t}).
    - eulerian: all points of a trajectory have the same end, d/ds X_{s,t}(x_s) = 0.
    - two-stage: the semigroup property in squared error (version 1 of the paper). A first network
      learns to correct an Euler step. A flow map then learns the corrected steps. No prompts.
The first two differentiate the network with respect to time. They are unstable near t = 1, so their
journeys end at tau = .99 or earlier.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import distill
import flm

# ------------------------------------------------------ 1. Targets, with the arguments of semigroup

def lagrangian(delta, denoiser, model, state, tau_s, tau_t):
    """delta_{s,t}(x) = D_t(X_{s,t}(x)) - (1-t)(t-s)/(1-s) d/dt delta_{s,t}(x).

    It does not constrain the map at t = 1, where D_1(X) = X for every X.
    """
    def delta_at(t):
        return delta(state, tau_s, model.clock.tau(t))
    s, t = distill.times(model, tau_s, tau_t)
    probs, slope = derivative(delta_at, (t[:, 0, 0],), (torch.ones_like(tau_t),))
    end = distill.flow_map(model, state, probs, tau_s, tau_t)
    factor = (1 - t) * (t - s) / (1 - s)
    return to_simplex(denoiser(end, tau_t) - factor * slope)

def eulerian(delta, denoiser, model, state, tau_s, tau_t):
    """delta_{s,t}(x) = D_s(x) + (t-s)(1-s)/(1-t) d/ds delta_{s,t}(x_s), with dx/ds = b_s(x).

    The factor of the derivative is unbounded near t = 1.
    """
    def delta_at(s, x):
        return delta(x, model.clock.tau(s), tau_t)
    s, t = distill.times(model, tau_s, tau_t)
    probs = denoiser(state, tau_s)
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

# ------------------------------------------------------------------------------------ 2. Two stages

class Correction(flm.Transformer):
    """The network g_{s,t} of the first stage, which makes an Euler step exact to second order:

    X_{s,t}(x) = x + (t-s) b_s(x) + (t-s)^2/2 g_{s,t}(x)
    """

    def __init__(self, config, V):
        super().__init__(config, V, two_times=True)
        self.log_weight = nn.Parameter(torch.zeros(10))  # log of the error by tenth of tau_s

    def logits(self, x):
        """g, (B, L, V), without a cap, because its values reach hundreds."""
        return self.head(x).float()

def corrected(correction, teacher):
    """The mean denoiser of corrected steps: delta_{s,t} = D_s + (1-s)(t-s)/2 g_{s,t}; sums to 1."""
    denoiser = distill.frozen_denoiser(teacher, None, slice(None))

    def delta(state, tau_s, tau_t):
        s, t = distill.times(correction, tau_s, tau_t)
        with torch.no_grad():
            probs = denoiser(state, tau_s)
        g = correction(state, tau_s, tau_t)
        g = g - g.mean(-1, keepdim=True)
        factor = (1 - s) * (t - s) / 2
        return probs + factor * g
    return delta

def squared_loss(model, tokens, rows, delta, target):
    """|X - X'|^2 in V dimensions, with X the map of `delta` and X' the map of `target`.

    No gradient flows through X'. Returns the mean error over positions (B,), and tau_s (B,).
    """
    tau_s, tau_t = distill.draw_journeys(rows, rows.times(tokens.device))  # in all rows
    s, t = distill.times(model, tau_s, tau_t)
    state = torch.lerp(model.noise(rows), model.clean(tokens), s)

    with torch.no_grad():
        probs = target(state, tau_s, tau_t)
    error = delta(state, tau_s, tau_t) - probs
    error *= (t - s) / (1 - s).clamp(min=1e-9)
    error = error.square().sum(-1)  # (B, L)
    return error.mean(1), tau_s

def correction_loss(teacher):
    """First stage: corrected steps obey the semigroup property.

    The loss is exp(-w) error + w, with a learned w for each tenth of tau_s.
    """
    def loss(model, tokens, rows):
        delta = corrected(model, teacher)
        target = partial(distill.semigroup, delta, None, model)
        error, tau_s = squared_loss(model, tokens, rows, delta, target)
        tenth = (tau_s * 10).long().clamp(max=9)
        w = model.log_weight[tenth]
        weighted = error * torch.exp(-w) + w
        return weighted, tau_s
    return loss

def regression_loss(correction, teacher):
    """Second stage: a flow map learns the corrected steps."""
    target = corrected(correction, teacher)

    def loss(model, tokens, rows):
        return squared_loss(model, tokens, rows, distill.mean_denoiser(model), target)
    return loss

def sample_correction(teacher, correction, n, steps, seed):
    """Writes n texts in one corrected step from noise to data: tokens (n, L). Ignores `steps`."""
    def solve(rows, known):
        tau_s = torch.zeros(len(rows.index), device=correction.device)
        tau_t = tau_s + 1
        delta = corrected(correction, teacher)
        probs = delta(correction.noise(rows), tau_s, tau_t)
        return flm.most_probable(correction, probs)
    return flm.in_batches(correction, n, seed, solve)

# ---------------------------------------------------------------------------------- 3. Command line

TARGETS = dict(lagrangian=lagrangian, eulerian=eulerian)
HIDDEN = "teacher sample sample_steps num_samples renoise temperature prompt infill".split()

@dataclass
class Config(distill.Config):
    """Settings of a distillation with one of these objectives."""

    objective: str = flm.setting("two-stage", "objective of the distillation",
                                  choices=("two-stage", *TARGETS), group="objective")

    def saved(self):
        return super().saved() | dict(objective=self.objective)

def make_student(network, config, flow):
    """A network with two times and the flow's weights. A Correction starts at g = 0."""
    model = flm.build(config, flow.tokenizer, flow.device, config.bf16, network)
    weights = flow.state_dict()
    if network is Correction:
        del weights["head.weight"], weights["head.bias"]
    model.load_state_dict(weights, strict=False)
    model.embedding.requires_grad_(False)  # flow and student have the same states
    return model

def main(argv):
    def defaults(flow):
        return dict(beta2=0.95, dropout=0.0) | distill.PRESETS.get(flow.dataset, {})
    config, flow, corpus = distill.join_run(argv, Config, __doc__, "fmlm", defaults, HIDDEN)
    if config.objective == "two-stage":
        config.condition_prob = 0.0
        first = replace(config, max_steps=config.max_steps // 2)
        config.max_steps -= first.max_steps
        model = make_student(Correction, first, flow)
        sample = partial(sample_correction, flow)
        correction = flm.train(
            model, correction_loss(flow), corpus, first, "fmlm.correction", sample)
        loss = regression_loss(correction, flow)
    else:
        config.compile = False  # torch.func.jvp needs an uncompiled network
        loss = distill.map_loss(flow, TARGETS[config.objective], latest=0.99, ends=0)
    model = make_student(flm.FlowMap, config, flow)
    model = flm.train(model, loss, corpus, config, "fmlm", distill.one_step)
    for steps in (1, 2, 4):
        texts = distill.sample(model, 8, steps, config.seed)
        flm.show(f"map, steps: {steps}", model, texts)

if __name__ == "__main__":
    flm.run_command(main)
