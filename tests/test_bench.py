"""extras/bench.py on small networks."""

import pytest
import torch

from extras import bench
from test_flm import run

@pytest.mark.parametrize("what, last", [("step", "materialised"), ("distill", "map"),
                                        ("sample", "ar 8"), ("data", "batches")])
def test_tables(what, last, capsys):
    """The last row is of 4 texts of 8 tokens, or of 128. Numbers are rounded to 6 digits."""
    run(bench, f"--what {what} --vocab-size 99 --width 16 --heads 2 --depth 1 --batch-size 4 "
               "--seq-len 8 --repeats 1 --device cpu --tokenizer chars")
    header, *rows = capsys.readouterr().out.split("name")[1].splitlines()
    numbers = map(float, rows[-1].split(last)[1].split())
    row = dict(zip(header.split(), numbers, strict=True))
    assert row["tokens_per_s"] > 0
    if what != "data":
        tokens = 8 * row.get("texts", 4)
        assert row["seconds"] * row["tokens_per_s"] == pytest.approx(tokens, rel=1e-4)

def test_measurements():
    """Of the three sums, at most two exist at a time. The first run is to warm up."""
    a, calls = torch.ones(10**6), []
    assert bench.peak_bytes(lambda: a + a + a + a) == 2 * 4 * 10**6
    bench.median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert "".join(calls) == "ababab"  # in turn
