"""extras/objectives.py: the exact map as a fixed point, times near 1, and short runs."""

import math
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import distill
import flm
from data import UserError
from extras import objectives
from test_flm import TINY, ExactFlow, gradients, network, run

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

    def forward(self, state, tau_s, tau_t=None):
        s, t = (x.double() for x in distill.times(self, tau_s, tau_t))
        difference = self.exact(state, tau_s, tau_t) - self.exact(state, tau_s)
        g = (2 * difference / ((1 - s) * (t - s)).clamp(min=1e-30)).float()
        return g + self.theta if torch.is_grad_enabled() else g

@pytest.mark.parametrize("objective", [objectives.lagrangian, objectives.eulerian])
def test_the_true_map_is_a_fixed_point(objective):
    """Rounding as in test_flm.py: 1e-5. One Euler step instead of the map is no fixed point."""
    flow = SmoothFlow()
    draw = partial(distill.draw_journeys, latest=0.99, ends=0)
    loss = partial(distill.map_loss, flow, target=partial(objective, flow), draw=draw)
    assert (gradients(loss, SmoothFlow(rows=512))[0] > 1e-5).sum() <= 1
    assert (gradients(loss, SmoothFlow(rows=512, coarse=True))[0] > 0.01).sum() > 100

def test_the_true_map_is_a_fixed_point_of_both_stages(monkeypatch):
    """The corrected step with the exact g is the exact map; with g = 0 it is one Euler step."""
    monkeypatch.setattr(distill, "draw_journeys", partial(distill.draw_journeys, ends=0))
    first = partial(objectives.correction_loss, ExactFlow())
    second = partial(objectives.regression_loss, ExactFlow(), ExactCorrection())
    for loss, model in ((first, ExactCorrection), (second, ExactFlow)):
        assert gradients(loss, model(rows=512))[0].max() < 1e-5
        assert (gradients(loss, model(rows=512, coarse=True))[0] > 1e-3).sum() > 100

@pytest.mark.parametrize("objective", [objectives.lagrangian, objectives.eulerian])
def test_targets_are_distributions_at_all_times(objective):
    """Also for s or t = 1 and next to it. The sum of 5 rounded shares is 1 to 5 * 6e-8."""
    grid = torch.cat([torch.linspace(0, 1, 9), 1 - 2.0 ** -torch.arange(4, 25)]).sort()[0]
    tau_s, tau_t = torch.combinations(grid, with_replacement=True).T
    flow, model = network(5), network(5, flm.FlowMap)
    state = model.noise(len(tau_s)).lerp(model.clean(torch.ones(5).long()), tau_s[:, None, None])
    target = objective(flow, partial(objectives.denoise, model), model, state, tau_s, tau_t)
    assert target.min() >= 0 and (target.sum(-1) - 1).abs().max() < 3e-7

def test_a_correction_has_no_cap():
    model = objectives.Correction(flm.Config(logit_cap=30.0, depth=0, width=8, heads=2), 5)
    torch.nn.init.constant_(model.head.bias, 100.0)  # the weight is 0
    assert (model(torch.randn(1, 3, 8), torch.zeros(1), torch.ones(1)) == 100).all()

@pytest.mark.parametrize("objective, steps", [("two-stage", 4), ("lagrangian", 2), ("eulerian", 2)])
def test_a_resumed_run_is_bit_identical(folder, monkeypatch, objective, steps):
    """Runs are interrupted after one step and resumed with the saved settings. Rows of 80 tokens
    use fused attention, which has no forward-mode derivative."""
    run(flm, f"{TINY} --tokenizer bpe --packing --seq-len 80 --max-steps 3 --run-dir r")
    flags = f"--run-dir r --objective {objective} --max-steps 2 --eval-every 1 --device cpu"
    monkeypatch.setattr(flm, "get_lr", lambda step, config: 0.01)
    run(objectives, flags)
    expected = {path: flm.load_checkpoint(path) for path in Path("r").iterdir()}
    assert len(expected) == 2 + (objective == "two-stage")  # the correction
    def interrupted(line, *rates):
        monkeypatch.setattr(flm, "get_lr", Mock(side_effect=[*rates, RuntimeError("stop")]))
        with pytest.raises(RuntimeError, match="stop"):
            run(objectives, line)
    interrupted(f"{flags} --overwrite")
    assert list(Path("r").iterdir()) == [Path("r/flm.pt")]
    for line in [flags, *["--run-dir r --device cpu --resume"] * (steps - 2)]:
        interrupted(line, 0.01)
        with pytest.raises(UserError, match="exists; use --resume"):
            run(objectives, flags)
    monkeypatch.setattr(flm, "get_lr", Mock(side_effect=[0.01]))
    run(objectives, "--run-dir r --device cpu --resume")
    for path, a in expected.items():
        b = flm.load_checkpoint(path)
        assert a["step"] == b["step"] and a["config"] == b["config"]
        assert all(torch.equal(x, b["average"][name]) for name, x in a["average"].items()), path
    model = flm.load("r/fmlm.pt")
    assert torch.equal(model.embedding, flm.load("r/flm.pt").embedding)
    assert model.time_t.mlp[2].weight.abs().max() > 0  # it was 0 at first
