"""--init-from: a new run starts as a trained flow."""

from pathlib import Path

import pytest
import torch
from nursery import attempt

import distill
import flm
from test_flm import HERE, TEXT, TINY

def test_a_run_starts_with_network_weights_and_tokenizer_of_another(folder):
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text("ab 1\nba 2\n" * 20)  # its own tokenizer would have 6 tokens
    assert not attempt(flm, f"{TINY} --width 8 --max-steps 2 --run-dir a")
    start = flm.load("a/flm.pt")
    options = "--dataset b.txt --init-from a/flm.pt --device cpu --sample-steps 2"
    still = "--max-steps 1 --lr 0 --run-dir b"
    assert not attempt(flm, f"{options} {still}")
    model = flm.load("b/flm.pt")
    assert model.tokenizer.content == start.tokenizer.content
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert model.config.width == 8 and model.config.dataset == "b.txt"
    assert not attempt(flm, "--resume --run-dir b --max-steps 2 --lr 1e-3 --beta2 .5 --device cpu")
    adamw = flm.load_checkpoint("b/flm.pt")["optimizers"][0]
    assert adamw["param_groups"][0]["betas"] == (0.9, 0.5)  # a flag replaces the saved setting
    assert not torch.equal(flm.load("b/flm.pt").head.weight, start.head.weight)
    assert not attempt(distill, "--run-dir b --max-steps 1 --device cpu")
    assert flm.load("b/fmlm.pt").tokenizer.content == start.tokenizer.content
    assert "--init-from" in attempt(flm, f"--resume --run-dir {HERE / 'pretrained/sentences'}")

@pytest.mark.parametrize("flags", ["flm.pt --width 16", "flm.pt --tokenizer bpe", "fmlm.pt"])
def test_other_networks_are_refused(folder, flags):
    Path("a.txt").write_text(TEXT)
    assert not attempt(flm, f"{TINY} --width 8 --max-steps 1 --run-dir a")
    assert not attempt(distill, "--run-dir a --max-steps 1 --device cpu")
    message = attempt(flm, f"--dataset a.txt --run-dir c --init-from a/{flags}")
    assert "needs an flm.pt and no flags of the network" in message
