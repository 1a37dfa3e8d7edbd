"""extras/bench.py on small networks."""

import pytest

from extras import bench
from test_flm import run

@pytest.mark.parametrize("what, last", [("step", "materialised"), ("distill", "map"),
                                        ("sample", "ar 8")])
def test_tables(what, last, capsys):
    """The last row is of 4 texts of 8 tokens, or of 128 texts. Numbers are rounded to 6 digits."""
    run(bench, f"--what {what} --vocab-size 99 --width 16 --heads 2 --depth 1 --batch-size 4 "
               "--seq-len 8 --repeats 1 --device cpu --tokenizer chars")
    header, *rows = capsys.readouterr().out.split("name")[1].splitlines()
    numbers = map(float, rows[-1].split(last)[1].split())
    row = dict(zip(header.split(), numbers, strict=True))
    assert row["tokens_per_s"] > 0
    tokens = 8 * row.get("texts", 4)
    assert row["seconds"] * row["tokens_per_s"] == pytest.approx(tokens, rel=1e-4)
