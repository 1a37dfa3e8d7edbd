"""What a GPU run relies on, as far as it shows without one."""

import sys
from pathlib import Path

import pytest
import torch

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
