"""--shard, over two processes on a CPU."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from run import read_checkpoint  # noqa: E402
from test_flm import TINY, command  # noqa: E402


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_sharded_run_is_the_run_of_one_process(tmp_path, monkeypatch, optimizer):
    """20 steps: losses, gradient norms, held-out losses and texts to 1e-4 (they differ by rounding). Then the same in three
    parts: sharded over two processes, on one, and sharded again. 300 held-out rows do not share
    out evenly."""
    monkeypatch.chdir(tmp_path)
    line = f"--max-steps 20 --eval-every 10 --optimizer {optimizer} {TINY} --eval-rows 300 --threads 1"
    done = [command(f"{line} --run-dir one"), command(f"{line} --shard --run-dir two", processes=2)]
    for more, processes in (f"{line} --stop-after 7 --shard", 2), ("--resume --stop-after 13", 0), ("--resume --shard", 2):
        done.append(command(f"{more} --threads 1 --run-dir parts", processes=processes))
    assert all(process.returncode == 0 for process in done), [process.stderr[-2000:] for process in done]
    assert done[0].stdout == done[1].stdout == done[-1].stdout
    logs = [[json.loads(line) for line in Path(run, "flm.log.jsonl").read_text().splitlines()] for run in
            ("one", "two", "parts")]
    for lines in zip(*logs, strict=True):
        for name in {"loss", "heldout", "grad_norm"} & lines[0].keys():
            assert max(abs(line[name] - lines[0][name]) for line in lines) < 1e-4
    one, two = (read_checkpoint(Path(run, "flm.pt"))["model"] for run in ("one", "two"))
    assert all(value.shape == one[name].shape for name, value in two.items())


def test_what_joins_a_run_is_sharded_too(tmp_path, monkeypatch):
    """A map in one stage and in two, and the baselines, write what they write after training in one process."""
    monkeypatch.chdir(tmp_path)
    assert command(f"--max-steps 4 {TINY} --run-dir flow").returncode == 0
    for program, flags in (("distill.py", ""), ("distill.py", "--objective two-stage"), ("baselines.py", "--model ar"),
                           ("baselines.py", "--model mdlm")):
        one, two = (command(f"--run-dir flow --overwrite --max-steps 4 --no-bf16 --threads 1 {flags} {shard}", processes,
                            program) for shard, processes in (("", 0), ("--shard", 2)))
        assert one.returncode == two.returncode == 0 and one.stdout == two.stdout, two.stderr[-2000:]
