"""extras/bench.py on small networks."""

import re

import pytest
import torch

from extras import bench
from test_flm import run

SMALL = ("--vocab-size 3000 --width 16 --heads 2 --depth 1 --batch-size 4 --seq-len 8 --repeats 1 "
         "--device cpu")

def table(capsys, flags):
    """The printed table as a list of dicts."""
    run(bench, f"{SMALL} {flags}")
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] == "name")
    return [dict(zip(lines[start], [line[0], *map(float, line[1:])])) for line in lines[start + 1:]]

def test_steps(capsys):
    """The step of the paper's formulas needs the one-hot vectors (B, L, V), or x, in addition to
    the logits: B L V floats. A tenth is left for what else differs between the two losses."""
    masked, flow, materialised = table(capsys, "--what step")
    assert [row["name"] for row in (masked, flow, materialised)] == [
        "masked", "flow", "materialised"]
    for row in (masked, flow, materialised, *table(capsys, "--what distill")):
        assert row["seconds"] * row["tokens_per_s"] == pytest.approx(4 * 8, rel=1e-4)  # 6 digits
    assert masked["time_ratio"] == masked["gb_ratio"] == 1
    one_hot = 4 * 8 * 3000 * 4 / 1e9
    assert materialised["gb"] - flow["gb"] > 0.9 * one_hot

def test_samples(capsys):
    texts = [(row["texts"], row["name"]) for row in table(capsys, "--what sample")]
    assert len(texts) == 11 and {(1, "flow 64"), (16, "map 1"), (128, "ar 8")} <= set(texts)

def test_data(capsys):
    rows = table(capsys, "--what data --tokenizer chars")
    assert [row["name"] for row in rows] == ["token files", "batches"]
    assert 0 < rows[0]["tokens_per_s"] < rows[1]["tokens_per_s"]

def test_measurements():
    def step():
        a, b = torch.empty(10**6), torch.empty(10**6)
        del a
        b[: 10**5].clone()
    assert bench.peak_bytes(step) == 8 * 10**6
    calls = []
    bench.median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ababab"  # in turn, with one run to warm up
