"""Other objectives for the distillation of a flow map. Writes fmlm.pt, as distill.py does.

    python -m extras.objectives --objective lagrangian --run-dir runs/sentences
    python distill.py --sample --run-dir runs/sentences

distill.py uses the semigroup property: X_{s,t} equals X_{s,u}, followed by X_{u,t}. This program
uses one of these objectives, with b_t the velocity of the flow:
    - lagrangian: the end of a journey follows the flow, d/dt X_{s,t} = b_t(X_{s,t}).
    - eulerian: all points of a trajectory have the same end, d/ds X_{s,t}(x_s) = 0.
Both differentiate the network with respect to time. They are unstable near t = 1, so their journeys
end at tau = .99 or earlier.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
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

# --------------------------------------------------------------------------------- 2. Command line
TARGETS = dict(lagrangian=lagrangian, eulerian=eulerian)

@dataclass
class Config(flm.Config):
    """Settings of a distillation. Those of the network are the flow's and are no flags."""

    objective: str = flm.setting("training", "lagrangian", "see above", tuple(TARGETS))
    run_dir: str = flm.setting("command", "runs/sentences", "folder of the flow")
    sample_steps: int = flm.setting("command", 1, "network evaluations per text")

def main(argv):
    given = flm.parse(argv, Config, __doc__, groups=("training", "command"))
    if given.get("sample"):
        raise UserError("--sample: use python distill.py --sample")
    path = Path(given.get("run_dir", Config.run_dir), "fmlm.pt")
    config, _, device, corpus = distill.follow_flow(
        Config, given, path, distill.PRESETS, beta2=0.95, dropout=0.0)
    config.compile = False  # torch.func.jvp needs an uncompiled network
    flow = flm.load(path.with_name("flm.pt"), device, config.bf16)
    model = flm.build(config, corpus.tokenizer, device, config.bf16, flm.FlowMap)
    model.load_state_dict(flow.state_dict(), strict=False)  # all but time_t
    model.embedding.requires_grad_(False)  # flow and map have the same states
    target = partial(TARGETS[config.objective], flow)
    draw = partial(distill.draw_journeys, latest=0.99, ends=0)
    loss = partial(distill.map_loss, flow, target=target, draw=draw)
    flm.train(model, loss, corpus, config, path, distill.sample)

if __name__ == "__main__":
    flm.run(main)
