"""extras/objectives.py: the exact map as a fixed point, times near 1, and short runs."""

from functools import partial

import pytest
import torch

import distill
import flm
from extras import objectives
from test_flm import TINY, ExactFlow, assert_equal, gradients, network, run, stop_at

class SmoothFlow(ExactFlow):
    """ExactFlow with a Newton step after its bisection, which gives the map its derivatives."""
    def exact(self, state, tau_s, tau_t=None):
        probs = super().exact(state, tau_s, tau_t)
        if tau_t is None or self.coarse:
            return probs
        s, t = (self.clock.t(tau).double()[:, None] for tau in (tau_s, tau_t))
        y = self.difference(state)
        end = ((t - s) * (probs[..., 1] - probs[..., 0]) + (1 - t) * y) / (1 - s)
        _, density = torch.func.jvp(lambda x: self.law(x, t), (end,), (torch.ones_like(end),))
        end = end - (self.law(end, t) - self.law(y, s)) / density
        d = (1 + ((1 - s) * end - (1 - t) * y) / (t - s)) / 2
        d = torch.where(t == s, probs[..., 1], d)
        return torch.stack([1 - d, d], -1).clamp(min=1e-30)

def test_the_true_map_is_a_fixed_point():
    """Rounding as in test_flm.py: 1e-5. One Euler step instead of the map is no fixed point."""
    draw = partial(distill.draw_journeys, latest=0.99, ends=0)
    map_loss = partial(distill.map_loss, SmoothFlow(), draw=draw)
    for objective in (objectives.lagrangian, objectives.eulerian):
        loss = partial(map_loss, target=partial(objective, SmoothFlow()))
        assert gradients(loss, SmoothFlow(rows=512))[0].max() < 1e-5
        assert (gradients(loss, SmoothFlow(rows=512, coarse=True))[0] > 0.01).sum() > 100

@pytest.mark.parametrize("objective", [objectives.lagrangian, objectives.eulerian])
def test_targets_are_distributions_at_all_times(objective):
    """5 rounded shares sum to 1 to 5 * 6e-8. Fused attention (65 tokens) has no forward mode."""
    grid = torch.cat([torch.linspace(0, 1, 9), 1 - 2.0 ** -torch.arange(4, 25)]).sort()[0]
    tau_s, tau_t = torch.combinations(grid, with_replacement=True).T
    flow, model = (network(5, make, seq_len=65) for make in (flm.Transformer, flm.FlowMap))
    state = model.noise(len(tau_s)).lerp(model.clean(torch.ones(65).long()), tau_s[:, None, None])
    target = objective(flow, partial(objectives.denoise, model), model, state, tau_s, tau_t)
    assert target.min() >= 0 and (target.sum(-1) - 1).abs().max() < 3e-7

@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_a_resumed_run_is_bit_identical(folder, objective):
    run(flm, f"{TINY} --max-steps 1 --run-dir r")
    flags = f"--max-steps 2 --eval-every 1 --run-dir r --device cpu --objective {objective}"
    run(objectives, flags)
    whole = flm.load("r/fmlm.pt").state_dict()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, distill, "map_loss", 3)
        run(objectives, f"{flags} --overwrite")
    run(objectives, f"{flags} --resume")
    assert_equal(flm.load("r/fmlm.pt").state_dict(), whole)
