"""extras/convert.py: checkpoints in the authors' format, whose network made the golden logits."""

import argparse
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import Call

import data
import flm
from data import UserError
from extras import convert
from test_flm import network, run

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NAMES = dict(embedding="vocab_embed.embedding", time_s="sigma_map", time_t="sigma_map_prime",
             norm="output_layer.norm_final", head="output_layer.linear", qkv="attn_qkv",
             modulation="output_layer.adaLN_modulation", out="attn_out")
MyList = type("MyList", (list,), {})

def release(path, two_times=False, width=64, logit_cap=30.0):
    """Writes a checkpoint in the authors' format. Returns the network with its averaged weights."""
    make = flm.FlowMap if two_times else flm.Transformer
    model = network(19, make, width=width, heads=1, logit_cap=logit_cap, attention_cap=50.0)
    averages = {"learnable_loss_weighting.mlp.weight": torch.randn(3, 3)}
    for name, average in model.state_dict().items():
        name = ".".join(NAMES.get(part, part) for part in name.split("."))
        averages[name.replace("0.output_layer", "0").replace("1.output_layer", "1")] = average
    state = {f"backbone._orig_mod.{name}": torch.randn_like(x) for name, x in averages.items()}
    state["backbone._orig_mod.rotary_emb.inv_freq"] = torch.randn(32)
    state |= {f"teacher_model.{name}": x + 1 for name, x in averages.items()}
    ema = dict(decay=0.9999, num_updates=7, shadow_params=list(averages.values()))
    objects = dict(state=argparse.Namespace(a=1), call=Call(open), path=Path("x"),
                   dict=defaultdict(list, b=[2]), list=MyList([3]))
    torch.save(dict(state_dict=state, ema=ema, global_step=5, objects=objects), path)
    return model

@pytest.mark.parametrize("kind", ["flm", "fmlm"])
@pytest.mark.parametrize("flag, cap", [("30", 30), ("none", 0)])
def test_a_converted_checkpoint_has_the_averaged_weights(folder, kind, flag, cap):
    expected = release("a.ckpt", kind == "fmlm", logit_cap=cap)
    run(convert, f"a.ckpt --seq-len 5 --run-dir run --logit-cap {flag}")
    content, model = flm.load_checkpoint(Path(f"run/{kind}.pt")), flm.load(f"run/{kind}.pt")
    state, *taus = torch.randn(5, 5, 64), *torch.rand(1 + (kind == "fmlm"), 5)
    assert torch.equal(model(state, *taus), expected(state, *taus))
    assert content["step"] == 5 and not torch.equal(content["model"]["embedding"], model.embedding)
    assert os.listdir("run") == [f"{kind}.pt"] and model.tokenizer.decode([3, 1]) == "3 1"
    objects = convert.read(Path("a.ckpt"))["objects"]
    assert objects["dict"] == {"b": [2]} and objects["list"] == [3]
    assert all(type(objects[x]) is convert.Empty for x in ("state", "call", "path"))
    assert not Path("executed").exists()  # by the objects in the file

@pytest.mark.skipif(not GOLDEN.exists(), reason="golden files are absent")
@pytest.mark.parametrize("cap, expected", [("none", "logits_v1"), ("30", "logits_v2")])
def test_the_golden_checkpoint(folder, cap, expected):
    """The authors' own network computed these logits, up to 15. Rounding changes 4e-6 of them."""
    golden = torch.load(GOLDEN / "official_flm_tiny_expected.pt", weights_only=True)
    run(convert, f"{GOLDEN}/official_flm_tiny.ckpt --seq-len 16 --run-dir run --logit-cap {cap}")
    model = flm.load("run/flm.pt")
    logits = model(golden["x"] @ model.embedding, golden["tau_s"])
    assert (logits - golden[expected]).abs().max() < 1e-4

def test_wrong_files_are_one_line_and_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(data, "make_tokenizer", lambda *_: argparse.Namespace(vocab_size=20))
    release("a.ckpt")
    run(convert, "a.ckpt --seq-len 5 --run-dir taken")
    content = convert.read(Path("a.ckpt"))
    good = Path("a.ckpt").read_bytes()
    Path("damaged.ckpt").write_bytes(good[:50000] + b"?" + good[50001:])
    content["ema"]["shadow_params"].pop()
    torch.save(content, "short.ckpt")
    del content["state_dict"]["backbone._orig_mod.blocks.1.attn_out.weight"], content["ema"]
    torch.save(content, "missing.ckpt")
    release("wide.ckpt", width=96)
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    for line, message in {
            "none.ckpt --seq-len 5": "none.ckpt: no such file",
            "a.txt --seq-len 5": "a.txt: not a released FLM or FMLM checkpoint (BadZipFile",
            "damaged.ckpt --seq-len 5": "is damaged",
            "short.ckpt --seq-len 5": "shorter",
            "missing.ckpt --seq-len 5": "blocks.1.out.weight",
            "wide.ckpt --seq-len 5": "V = 19, D = 96",
            "a.ckpt --dataset lm1b": "has V = 19, but --dataset lm1b has V = 20",
            "a.ckpt --seq-len 5 --run-dir a.txt": "--run-dir a.txt: File exists",
            "a.ckpt --seq-len 5 --run-dir taken": "flm.pt: exists; use --overwrite"}.items():
        with pytest.raises(UserError) as error:
            run(convert, f"--run-dir new {line}")
        assert message in str(error.value) and "\n" not in str(error.value), line
    assert before == {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    average = release("a.ckpt")
    run(convert, "a.ckpt --seq-len 5 --run-dir taken --overwrite")
    assert torch.equal(flm.load("taken/flm.pt").embedding, average.embedding)
