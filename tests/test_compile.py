"""What a GPU run relies on, as far as it shows without one."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import flm


@pytest.mark.parametrize("kind", ["linear", "posterior"])
@pytest.mark.parametrize("bf16, chunk", [(False, 0), (True, 0), (True, 8)])
def test_the_network_compiles_whole(kind, bf16, chunk):
    """One graph for the loss and one for the logits (fullgraph raises at a break), with the values of the network as it is.
    bfloat16 has 8 bits: its loss and gradients follow float32's within a few parts in 2^8."""
    torch.manual_seed(0)
    torch.compiler.reset()  # the cases share their code, and its limit of versions
    config = flm.Config(depth=2, width=32, heads=2, cond_width=8, seq_len=8, dropout=0, bf16=bf16, loss_chunk=chunk,
                        parameterization=kind)
    model = flm.Transformer(config, 40, torch.full((40,), 1 / 40).log())
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens = torch.randint(40, (4, 8))
    state, tau = (model.noise(torch.randn(4, 8, model.noise_dims)) + model.clean(tokens)).detach() / 2, torch.rand(4)
    loss, weight = compiled(state, tau, targets=tokens), model.blocks[0].qkv.weight
    assert torch.allclose(loss, model(state, tau, targets=tokens), atol=1e-5)
    assert torch.allclose(compiled(state, tau), model(state, tau), atol=1e-5)
    later = (1 + tau) / 2
    assert torch.allclose(compiled(state, tau, later), model(state, tau, later), atol=1e-5)  # as a map
    gradient = torch.autograd.grad(loss.mean(), weight)[0]
    config.bf16, config.loss_chunk = False, 0
    exact = model(state, tau, targets=tokens)
    assert (loss - exact).abs().max() < (0.05 if bf16 else 1e-5)
    expected = torch.autograd.grad(exact.mean(), weight)[0]
    assert (gradient - expected).norm() < (0.05 if bf16 else 1e-4) * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "posterior"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_never_waits_for_the_device(kind, optimizer):
    """Tensors without values: whatever would read one on the host, as .item(), a condition or an index by mask does, raises.
    Where there is a GPU, the same step with CUDA's own check for waiting."""
    config = flm.Config(depth=2, width=32, heads=2, cond_width=8, seq_len=8, dropout=0.1, bf16=True, loss_chunk=8,
                        parameterization=kind, optimizer=optimizer, condition_prob=0.5)

    def steps(device: str, mode) -> None:
        model = flm.Transformer(config, 40, torch.full((40,), 1 / 40).log()).to(device)
        tokens = torch.zeros(4, 8, dtype=torch.long, device=device)
        if device == "cpu":
            tokens = mode.from_tensor(tokens)
            for module in model.modules():
                for values in module._parameters, module._buffers:
                    values |= {name: mode.from_tensor(x) for name, x in values.items() if x is not None}
        objective, params = flm.Objective(model, flm.flow_loss), list(model.parameters())
        with mode:
            optimizers, ema = flm.make_optimizers(model, config), [p.detach().clone() for p in params]
            for step in range(3):
                if step == 1 and device == "cuda":  # the first one makes what lasts
                    torch.cuda.set_sync_debug_mode("error")
                loss = objective(tokens, flm.Rows(0, step, range(4), 4))[0].mean()
                loss.backward()
                assert all(p.grad is not None for p in params if p.requires_grad)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                for part in optimizers:
                    part.step()
                    part.zero_grad()
                torch._foreach_lerp_(ema, [p.detach() for p in params], 0.1)
            with pytest.raises((DataDependentOutputException, RuntimeError)):  # it would be seen
                loss.item()
    steps("cpu", FakeTensorMode())
    if torch.cuda.is_available():
        try:
            steps("cuda", contextlib.nullcontext())
        finally:
            torch.cuda.set_sync_debug_mode("default")
