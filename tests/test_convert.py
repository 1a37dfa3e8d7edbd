"""extras/convert.py: checkpoints in the authors' format, whose network made the golden logits."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import Call

import flm
from data import UserError
from extras import convert
from test_flm import network, run

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NAMES = dict(embedding="vocab_embed.embedding", time_s="sigma_map", time_t="sigma_map_prime",
             norm="output_layer.norm_final", head="output_layer.linear", qkv="attn_qkv",
             modulation="output_layer.adaLN_modulation", out="attn_out")

def release(path, make=flm.Transformer):
    """Writes a checkpoint in the authors' format. Returns the network with its averaged weights."""
    model = network(19, make, width=64, heads=1, logit_cap=30.0, attention_cap=50.0)
    averages = {"learnable_loss_weighting.mlp.weight": torch.randn(3, 3)}
    for name, average in model.state_dict().items():
        name = ".".join(NAMES.get(part, part) for part in name.split("."))
        averages[name.replace("0.output_layer", "0").replace("1.output_layer", "1")] = average
    state = {f"backbone._orig_mod.{name}": torch.randn_like(x) for name, x in averages.items()}
    state["backbone._orig_mod.rotary_emb.inv_freq"] = torch.randn(32)
    state |= {f"teacher_model.{name}": x + 1 for name, x in averages.items()}
    objects = [Call(open), Path("x"), defaultdict(list, b=[2])]
    ema = dict(shadow_params=list(averages.values()))
    torch.save(dict(state_dict=state, ema=ema, global_step=5, objects=objects), path)
    return model

@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_a_converted_checkpoint_has_the_averaged_weights(folder, kind):
    expected = release("a.ckpt", flm.NETWORKS[kind])
    run(convert, "a.ckpt --seq-len 5 --run-dir run")
    content, model = flm.load_checkpoint(Path(f"run/{kind}.pt")), flm.load(f"run/{kind}.pt")
    state, *taus = torch.randn(5, 5, 64), *torch.rand(1 + (kind == "fmlm"), 5)
    assert torch.equal(model(state, *taus), expected(state, *taus))
    assert content["step"] == 5 and not torch.equal(content["model"]["embedding"], model.embedding)
    assert not Path("executed").exists()  # by an object in the file

@pytest.mark.skipif(not GOLDEN.exists(), reason="golden files are absent")
@pytest.mark.parametrize("cap, expected", [("none", "logits_v1"), ("30", "logits_v2")])
def test_the_golden_checkpoint(folder, cap, expected):
    """The authors' own network computed these logits, up to 15. Rounding changes 4e-6 of them."""
    golden = torch.load(GOLDEN / "official_flm_tiny_expected.pt", weights_only=True)
    run(convert, f"{GOLDEN}/official_flm_tiny.ckpt --seq-len 16 --run-dir run --logit-cap {cap}")
    model = flm.load("run/flm.pt")
    logits = model(golden["x"] @ model.embedding, golden["tau_s"])
    assert (logits - golden[expected]).abs().max() < 1e-4

def test_wrong_files_are_one_line(folder):
    release("a.ckpt")
    good = Path("a.ckpt").read_bytes()
    Path("damaged.ckpt").write_bytes(good[:50000] + b"?" + good[50001:])
    cases = {"none.ckpt": "no such file", "a.txt": "not a zip file", "damaged.ckpt": "is damaged"}
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            run(convert, f"{name} --seq-len 5 --run-dir new")
        assert message in str(error.value) and "\n" not in str(error.value), name
    assert not Path("new").exists()
