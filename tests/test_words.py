"""Slow proofs: the README's first commands, run to their end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent


def run(folder: Path, program: str, flags: str, timeout: int) -> str:
    return subprocess.run([sys.executable, str(HERE / program), *flags.split()], cwd=folder, check=True, timeout=timeout,
                          stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`python flm.py` and `python distill.py`, in an empty folder."""
    folder = tmp_path_factory.mktemp("words")
    run(folder, "flm.py", "", 1500)
    run(folder, "distill.py", "", 1500)
    return folder


@pytest.fixture(scope="module")
def table(folder):
    """What evaluate.py says: {line: (perplexity, entropy, share of distinct texts, likeness to the flow)}."""
    text = run(folder, "evaluate.py", "--num-samples 1000", 600)
    print(text)
    return {line[:12].strip(): list(map(float, line[12:].split())) for line in text.splitlines()[3:]}


def test_the_default_command_learns_words_as_promised(folder, table):
    """At most .63 nats a position held out, Bayes' rule without context having 1.006, and texts of 64 steps within 4 times
    the perplexity of held-out words (measured: 3.1 times), each another; one step writes the same word from any noise."""
    log = (folder / "runs/words/flm.log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["heldout"] <= 0.63
    assert table["flow 64"][0] < 4 * table["held out"][0]
    assert table["flow 64"][2] > 0.95 and table["flow 1"][2] < 0.05


def test_the_map_writes_in_one_step_what_the_flow_writes_in_many(table):
    """One step within 1.25 times the perplexity of the flow's 64, two within 1.1; entropy within .1 nats and .9 of its
    distinct texts; three tokens in four are those of the flow's 256 steps from the same noise."""
    flow, one, two = (table[name] for name in ("flow 64", "map 1", "map 2"))
    assert one[0] <= 1.25 * flow[0] and two[0] <= 1.1 * flow[0]
    assert abs(one[1] - flow[1]) <= 0.1 and one[2] >= 0.9 * flow[2]
    assert one[3] >= 0.75
