"""extras/objectives.py: the exact map as a fixed point, and short runs."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

import distill
import flm
from extras import objectives
from test_flm import TINY, ExactFlow, gradients, run

class SmoothFlow(ExactFlow):
    """ExactFlow with a Newton step after its bisection, which gives the map its derivatives."""

    def exact(self, state, tau_s, tau_t=None):
        probs = super().exact(state, tau_s, tau_t)
        if tau_t is None or self.coarse:
            return probs
        s, t = (self.clock.t(tau).double()[:, None] for tau in (tau_s, tau_t))
        y, scale = self.difference(state), math.sqrt(2) * (1 - t)
        end = ((t - s) * (probs[..., 1] - probs[..., 0]) + (1 - t) * y) / (1 - s)
        density = sum(p * torch.exp(-(x / scale) ** 2 / 2) / (scale * math.sqrt(2 * math.pi))
                      for p, x in ((self.p, end - t), (1 - self.p, end + t)))
        end = end - (self.law(end, t) - self.law(y, s)) / density
        d = (1 + ((1 - s) * end - (1 - t) * y) / (t - s)) / 2
        return torch.stack([1 - d, d], -1).clamp(min=1e-30)

class ExactCorrection(ExactFlow):
    """g_{s,t} of the exact map; 0 if coarse."""

    log_weight = torch.zeros(10)

    def forward(self, state, tau_s, tau_t=None, known=None):
        s, t = (x.double() for x in distill.times(self, tau_s, tau_t))
        difference = self.exact(state, tau_s, tau_t) - self.exact(state, tau_s)
        g = (2 * difference / ((1 - s) * (t - s)).clamp(min=1e-30)).float()
        return g + self.theta if torch.is_grad_enabled() else g

@pytest.mark.parametrize("objective", [objectives.lagrangian, objectives.eulerian])
def test_the_true_map_is_a_fixed_point(objective):
    """Rounding as in test_flm.py: 1e-5. One Euler step instead of the map is no fixed point."""
    loss = distill.map_loss(SmoothFlow(), objective, latest=0.99, ends=0)
    assert (gradients(loss, SmoothFlow(rows=512))[0] > 1e-5).sum() <= 1
    assert (gradients(loss, SmoothFlow(rows=512, coarse=True))[0] > 0.01).sum() > 100

def test_the_true_map_is_a_fixed_point_of_both_stages(monkeypatch):
    """The corrected step with the exact g is the exact map; with g = 0 it is one Euler step."""
    monkeypatch.setattr(distill, "draw_journeys", partial(distill.draw_journeys, ends=0))
    first = objectives.correction_loss(ExactFlow())
    second = objectives.regression_loss(ExactCorrection(), ExactFlow())
    for loss, network in ((first, ExactCorrection), (second, ExactFlow)):
        assert gradients(loss, network(rows=512))[0].max() < 1e-5
        assert (gradients(loss, network(rows=512, coarse=True))[0] > 1e-3).sum() > 100

def test_a_correction_has_no_cap():
    model = objectives.Correction(flm.Config(depth=1, width=8, heads=2, seq_len=3), 5)
    torch.nn.init.constant_(model.head.bias, 100.0)
    output = model(torch.randn(1, 3, 8), torch.zeros(1), torch.ones(1))
    assert torch.equal(output, torch.full((1, 3, 5), 100.0))

@pytest.mark.parametrize("objective", ["two-stage", "lagrangian", "eulerian"])
def test_every_objective_writes_a_map(folder, objective):
    """Rows of 80 tokens use fused attention, which has no forward-mode derivative. A resumed run
    gives the weights of an uninterrupted one."""
    run(flm, f"{TINY} --tokenizer bpe --packing --seq-len 80 --max-steps 3 --run-dir r")
    flags = f"--objective {objective} --run-dir r --max-steps 4 --eval-every 1 --device cpu"
    run(objectives, flags)
    model = flm.load("r/fmlm.pt")
    assert model.kind == "fmlm" and distill.sample(model, 2, 2, seed=0).shape == (2, 80)
    assert torch.equal(model.embedding, flm.load("r/flm.pt").embedding)
    assert model.time_t.mlp[2].weight.abs().max() > 0  # it was 0 at first

    Path("r/fmlm.prev.pt").replace("r/fmlm.pt")  # one step earlier
    run(objectives, f"{flags} --resume")
    assert all(map(torch.equal, model.parameters(), flm.load("r/fmlm.pt").parameters()))
