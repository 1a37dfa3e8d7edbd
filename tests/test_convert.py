"""extras/convert.py: checkpoints in the authors' format against their network."""

import argparse
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Call

import flm
from data import Tokenizer, UserError
from extras import convert

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
V, L, D, C = 19, 7, 64, 8

def textbook_logits(w, x, tau_s, tau_t, cap):
    """The authors' network, with their names, of one-hot states x (B, L, V)."""
    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def time(name, tau):
        angle = tau[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        features = torch.cat([angle.cos(), angle.sin()], 1)
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", features)))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:]) * w[f"{name}.weight"]

    def rotate(x):  # (B, L, heads, 64): pairs (j, j + 32) turn by position / 10000^(j/32)
        angle = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(32) / 32)
        z = torch.complex(x[..., :32], x[..., 32:]) * torch.exp(1j * angle)[:, None]
        return torch.cat([z.real, z.imag], -1)
    cond = F.silu(time("sigma_map", tau_s)
                  + (0 if tau_t is None else time("sigma_map_prime", tau_t)))
    h = x @ w["vocab_embed.embedding"]
    B, L, D = h.shape
    for i in range(sum(name.endswith("attn_qkv.weight") for name in w)):
        b = f"blocks.{i}."
        modulation = linear(f"{b}adaLN_modulation", cond)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(D, -1)
        qkv = linear(f"{b}attn_qkv", norm(f"{b}norm1", h) * (1 + scale1) + shift1)
        q, k, v = qkv.view(B, L, 3, D // 64, 64).unbind(2)
        scores = torch.einsum("blhd,bmhd->bhlm", rotate(q), rotate(k)) / 8
        weights = (50 * torch.tanh(scores / 50)).softmax(-1)
        read = torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(B, L, D)
        h = h + gate1 * linear(f"{b}attn_out", read)
        hidden = linear(f"{b}mlp.0", norm(f"{b}norm2", h) * (1 + scale2) + shift2)
        h = h + gate2 * linear(f"{b}mlp.2", F.gelu(hidden, approximate="tanh"))
    shift, scale = linear("output_layer.adaLN_modulation", cond)[:, None].split(D, -1)
    z = linear("output_layer.linear", norm("output_layer.norm_final", h) * (1 + scale) + shift)
    return cap * torch.tanh(z / cap) if cap else z

def shapes(two_times, D):
    """Names and shapes of the authors' parameters, in their order."""
    layers = []
    for time in ("sigma_map", "sigma_map_prime")[: 1 + two_times]:
        layers += [(f"{time}.mlp.0", C, 256), (f"{time}.mlp.2", C, C)]
    layers += [("learnable_loss_weighting.mlp", 3, 3)] * two_times
    for b in ("blocks.0.", "blocks.1."):
        layers += [(b + "norm1", D), (b + "attn_qkv", 3 * D, D), (b + "attn_out", D, D),
                   (b + "norm2", D), (b + "mlp.0", 4 * D, D), (b + "mlp.2", D, 4 * D),
                   (b + "adaLN_modulation", 6 * D, C)]
    layers += [("output_layer.norm_final", D), ("output_layer.linear", V, D),
               ("output_layer.adaLN_modulation", 2 * D, C)]
    found = {"vocab_embed.embedding": (V, D)}
    for name, *shape in layers:
        found[f"{name}.weight"] = shape
        if not ("norm" in name or "attn" in name):
            found[f"{name}.bias"] = shape[:1]
    return found

def release(path, two_times=False, D=D, **extra):
    """Writes a checkpoint in the authors' format, with random weights; returns the averages."""
    trained, average = [
        {name: torch.randn(shape) / (math.sqrt(shape[1]) if shape[1:] else 1)
         for name, shape in shapes(two_times, D).items()} for _ in range(2)]
    state = {f"backbone._orig_mod.{name}": x for name, x in trained.items()}
    state["backbone._orig_mod.rotary_emb.inv_freq"] = torch.randn(32)
    state |= {f"teacher_model.{name}": x + 1 for name, x in trained.items()}
    ema = dict(decay=0.9999, num_updates=7, shadow_params=list(average.values()))
    torch.save(dict(state_dict=state, ema=ema, global_step=5) | extra, path)
    return average

@pytest.mark.parametrize("two_times", [False, True])
@pytest.mark.parametrize("cap", ["30", "none"])
def test_a_released_checkpoint_gives_the_logits_of_the_authors_network(folder, two_times, cap):
    average = release("a.ckpt", two_times)
    convert.main(f"a.ckpt --seq-len {L} --run-dir run --logit-cap {cap}".split())
    model = flm.load("run/fmlm.pt" if two_times else "run/flm.pt")
    x, times = torch.randn(5, L, V), (torch.rand(5), torch.rand(5) if two_times else None)
    expected = textbook_logits(average, x, *times, cap=0 if cap == "none" else 30)
    assert (model(x @ model.embedding, *times) - expected).abs().max() < 1e-4
    assert expected.abs().max() > 4 and model.step == 5

@pytest.mark.skipif(not GOLDEN.exists(), reason="golden files are absent")
@pytest.mark.parametrize("cap, expected", [("none", "logits_v1"), ("30", "logits_v2")])
def test_the_golden_checkpoint(folder, cap, expected):
    """The authors' own network computed these logits."""
    golden = torch.load(GOLDEN / "official_flm_tiny_expected.pt", weights_only=True)
    flags = f"--seq-len 16 --run-dir run --logit-cap {cap}".split()
    convert.main([f"{GOLDEN}/official_flm_tiny.ckpt", *flags])
    model = flm.load("run/flm.pt")
    logits = model(golden["x"] @ model.embedding, golden["tau_s"])
    assert (logits - golden[expected]).abs().max() < 1e-4

MyList = type("MyList", (list,), {})

def test_objects_in_a_checkpoint_are_never_made(folder):
    objects = dict(state=argparse.Namespace(a=1), call=Call(open), path=Path("x"),
                   dict=defaultdict(list, b=[2]), list=MyList([3]))
    release("a.ckpt", hyper_parameters=objects)
    content = convert.read(Path("a.ckpt"))["hyper_parameters"]
    assert content["dict"] == {"b": [2]} and content["list"] == [3]
    assert all(type(content[x]) is convert.Empty for x in ("state", "call", "path"))
    convert.main(f"a.ckpt --seq-len {L} --run-dir run".split())
    assert flm.load("run/flm.pt").V == V and not Path("executed").exists()

def contents():
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}

def test_wrong_files_are_one_line_and_change_nothing(folder):
    release("good.ckpt")
    good, content = Path("good.ckpt").read_bytes(), torch.load("good.ckpt")
    Path("flipped.ckpt").write_bytes(good[:9999] + bytes([good[9999] ^ 1]) + good[10000:])
    torch.save(Call(os.mkdir), "code.ckpt")
    content["ema"]["shadow_params"].pop()
    torch.save(content, "short.ckpt")
    del content["state_dict"]["backbone._orig_mod.blocks.1.attn_out.weight"], content["ema"]
    torch.save(content, "missing.ckpt")
    release("wide.ckpt", D=96)
    convert.main(f"good.ckpt --seq-len {L} --run-dir taken".split())
    Path("other").mkdir()
    Tokenizer(dict(kind="chars", chars="ab")).save(Path("other/tokenizer.json"))
    before = contents()
    for line, message in {
            "a.txt --seq-len 7": "a.txt: not a released FLM or FMLM checkpoint (BadZipFile",
            "flipped.ckpt --seq-len 7": "is damaged",
            "code.ckpt --seq-len 7": "code.ckpt: not a released",
            "short.ckpt --seq-len 7": "shorter",
            "missing.ckpt --seq-len 7": "blocks.1.out.weight",
            "wide.ckpt --seq-len 7": "V = 19, D = 96",
            "good.ckpt --seq-len 7 --run-dir taken": "taken: contains flm.pt; use --overwrite",
            "good.ckpt --seq-len 7 --run-dir other": "other: contains another vocabulary"}.items():
        with pytest.raises((UserError, OSError)) as error:
            convert.main(f"--run-dir new {line}".split())
        assert message in str(error.value) and "\n" not in str(error.value), line
    assert contents() == before
    average = release("good.ckpt")
    convert.main(f"good.ckpt --seq-len {L} --run-dir taken --overwrite".split())
    assert torch.equal(flm.load("taken/flm.pt").embedding, average["vocab_embed.embedding"])
