"""extras/bench.py on small networks."""

import json

import pytest
import torch

from extras import bench

SMALL = "--vocab 3000 --width 16 --heads 2 --depth 1 --rows 4 --seq-len 8 --repeats 1 --threads 1"

def test_tables(folder, capsys):
    what = "step", "sample", "distill"
    bench.main([*SMALL.split(), "--json", "b.json", "--what", *what])
    report = json.loads((folder / "b.json").read_text())
    assert [line for line in capsys.readouterr().out.split("\n") if line in what] == list(what)
    for row in report["step"] + report["distill"]:
        assert row["seconds"] * row["tokens_per_s"] == pytest.approx(4 * 8)
    masked, flow, materialised = report["step"]
    assert masked["time_ratio"] == masked["gb_ratio"] == 1
    one_hot = 4 * 8 * 3000 * 4 / 1e9  # B L V floats, needed together with the logits
    assert materialised["gb"] - flow["gb"] > 0.9 * one_hot
    texts = [(row["texts"], row["name"]) for row in report["sample"]]
    assert len(texts) == 11 and {(1, "flow 64"), (16, "map 1"), (128, "ar 8")} <= set(texts)

def test_measurements():
    def step():
        a, b = torch.empty(10**6), torch.empty(10**6)
        del a
        b[: 10**5].clone()
    assert bench.peak_bytes(step) == 8 * 10**6
    calls = []
    bench.median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ababab"  # in turn, with one run to warm up
