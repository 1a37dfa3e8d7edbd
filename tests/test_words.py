"""Slow proofs: the README's first commands, run to their end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent


def run(*folders_and_programs: tuple[Path, str]) -> None:
    """Commands side by side."""
    running = [subprocess.Popen([sys.executable, str(HERE / name), *flags], cwd=folder)
               for folder, (name, *flags) in ((folder, line.split()) for folder, line in folders_and_programs)]
    assert [process.wait(1500) for process in running] == [0] * len(running)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`python flm.py`, `python distill.py`, `python baselines.py` and `python evaluate.py` in an empty folder; those in the
    middle at once, the second in a copy of it."""
    folder, copy = tmp_path_factory.mktemp("words"), tmp_path_factory.mktemp("words") / "copy"
    run((folder, "flm.py"))
    shutil.copytree(folder, copy)
    run((folder, "distill.py"), (copy, "baselines.py"))
    for path in (copy / "runs/words").glob("mdlm*"):
        shutil.move(path, folder / "runs/words")
    run((folder, "evaluate.py --steps 1 2 64 --churn 0 --hide"))  # what is asked of it below
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "runs/words/quality.json").read_text())


@pytest.fixture(scope="module")
def table(report):
    """{(model, steps): what was measured}."""
    return {(result["model"], result["steps"]): result for result in report["samples"]}


def test_the_default_command_learns_words_as_promised(folder, report, table):
    """At most .63 nats a position held out, Bayes' rule without context having 1.006, and texts of 64 steps within 4 times
    the perplexity of held-out words (measured: 3.1 times), each another; one step writes the same word from any noise."""
    log = (folder / "runs/words/flm.log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["heldout"] <= 0.63
    assert table["flm", 64]["perplexity"] < 4 * report["heldout_text"]["perplexity"]
    assert table["flm", 64]["distinct"] > 0.95 and table["flm", 1]["distinct"] < 0.05


def test_the_map_writes_in_one_step_what_the_flow_writes_in_many(table):
    """One step within 1.25 times the perplexity of the flow's 64, two within 1.1; entropy within .1 nats and .9 of its
    distinct texts; three tokens in four are those of the flow's 64 steps from the same noise."""
    flow, one, two = table["flm", 64], table["fmlm", 1], table["fmlm", 2]
    assert one["perplexity"] <= 1.25 * flow["perplexity"] and two["perplexity"] <= 1.1 * flow["perplexity"]
    assert abs(one["entropy"] - flow["entropy"]) <= 0.1 and one["distinct"] >= 0.9 * flow["distinct"]
    assert one["as_flow"] >= 0.75


def test_one_step_of_the_map_writes_better_than_two_of_masked_diffusion(report, table):
    """The paper's claim at one's desk, equal tokens of training for flow and baseline: lower perplexity at no lower entropy.
    The flow's likelihood bound is below the unigram cross-entropy."""
    one, masked = table["fmlm", 1], table["mdlm", 2]
    assert one["perplexity"] < masked["perplexity"] and one["entropy"] >= masked["entropy"]
    assert report["likelihood"]["flm"]["nats"] < report["unigram_nats"]
