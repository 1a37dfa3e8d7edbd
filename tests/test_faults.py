"""Kills, full disks, damaged files and failed processes: the last checkpoint survives."""

import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Call
from nursery import attempt, finish

import distill
import flm
from extras import baselines
from test_flm import HERE, TEXT, TINY, assert_equal, run

FLOW = f"{TINY} --dropout .1 --run-dir r --max-steps 60 --eval-every 20 --sample-steps 2"
RUN = "--run-dir r --device cpu"
MAP = f"{RUN} --max-steps 60"
CHECKPOINT = Path("r/flm.pt")

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of a flow and its map that were trained without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        Path("a.txt").write_text(TEXT)
        assert finish(flm, FLOW) == finish(distill, MAP) == 0
        return Path("r").resolve()

@pytest.fixture
def flow(whole, folder):
    """A copy of the flow in r/flm.pt."""
    CHECKPOINT.parent.mkdir()
    shutil.copy(whole / "flm.pt", CHECKPOINT)

def assert_same_training(whole, kind="flm"):
    """r/KIND.pt has the steps, weights, averages and optimizer states of `whole`."""
    a, b = (flm.load_checkpoint(Path(folder, f"{kind}.pt")) for folder in ("r", whole))
    for name in ("step", "model", "average", "optimizers"):
        assert_equal(a[name], b[name])

def reached(evaluations, path):
    return Path("err").read_text().count("held-out loss") >= evaluations and path.exists()

@pytest.mark.parametrize("program, kind, line, kills", [
    (flm, "flm", FLOW, 20), (distill, "fmlm", MAP, 6)])
def test_kills_at_any_moment_change_nothing(whole, flow, program, kind, line, kills):
    """SIGKILL after 0 to 2 evaluations; every other one while a checkpoint is written."""
    if kind == "flm":
        shutil.rmtree("r")
    line = f"{line} --eval-every 1 --resume"
    draw = random.Random(0)
    for i in range(kills):
        moment = partial(reached, draw.randrange(3), Path(f"r/{kind}.part" if i % 2 else "."))
        assert finish(program, line, kill_when=moment, delay=draw.uniform(0, 0.03)) == -9
    assert 0 < flm.load_checkpoint(Path(f"r/{kind}.pt"))["step"] < 60
    assert finish(program, line) == 0
    assert_same_training(whole, kind)

def test_a_full_disk_keeps_the_last_checkpoint(whole, folder):
    """The limit is on the size of a file. First it is too small for the token files."""
    assert finish(flm, FLOW, most_bytes=4000) > 0
    assert not [path for path in Path("data").iterdir() if path.is_dir()]
    assert finish(flm, FLOW, kill_when=CHECKPOINT.exists) == -9
    before = CHECKPOINT.read_bytes()
    assert finish(flm, f"{RUN} --resume", most_bytes=len(before) // 2) == 2
    assert "program: r/flm.pt: mend this, then use --resume: " in Path("err").read_text()
    assert CHECKPOINT.read_bytes() == before and not Path("r/flm.part").exists()
    assert finish(flm, f"{RUN} --resume") == 0
    assert_same_training(whole)

def test_damaged_and_foreign_checkpoints_are_one_line_and_never_executed(whole, flow):
    good, content = CHECKPOINT.read_bytes(), flm.load_checkpoint(CHECKPOINT)
    with zipfile.ZipFile("other.zip", "w") as other:
        other.writestr("flm/data.pkl", "mine")
    files = [good[: len(good) * i // 20] for i in range(20)]
    files += [random.Random(0).randbytes(5000), Path("other.zip").read_bytes(), b'{"format": 3}']
    files += [pickle.dumps(Call(open)), pickle.dumps(content), Call(open), [1, 2]]
    files += [content | dict(config=Call(open)), content | dict(format=2)]
    for file in files:
        if isinstance(file, bytes):
            CHECKPOINT.write_bytes(file)
        else:
            torch.save(file, CHECKPOINT)
        for program, flag in ((flm, "--resume"), (flm, "--sample"), (distill, ""), (baselines, "")):
            assert attempt(program, f"{RUN} {flag}").startswith("r/flm.pt: ")
            assert not Path("executed").exists()
    assert not attempt(flm, f"{FLOW} --overwrite")  # the message proposes it
    assert_same_training(whole)

def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(folder, monkeypatch):
    """The loss is NaN from step 25 if the learning rate is above .001."""
    steps = []
    def broken(model, tokens, flow_loss=flm.flow_loss):
        nats, tau = flow_loss(model, tokens)
        steps.append(model.training)
        fails = sum(steps) > 24 and model.config.lr > 0.001
        return nats * (torch.nan if fails else 1), tau
    monkeypatch.setattr(flm, "flow_loss", broken)
    for line in (FLOW, f"{FLOW} --resume"):
        assert re.search("is not a number.*--resume.*a smaller --lr", attempt(flm, line))
        assert flm.load_checkpoint(CHECKPOINT)["step"] == 20
    assert not attempt(flm, f"{FLOW} --resume --lr .001")
    content = flm.load_checkpoint(CHECKPOINT)
    assert content["step"] == 60 and content["config"]["lr"] == 0.001
    assert all(weights.isfinite().all() for weights in content["model"].values())

def test_a_text_that_has_moved_is_recognised(flow):
    Path("a.txt").rename("b.txt")
    for program, kind in ((distill, "fmlm"), (baselines, "mdlm"), (flm, "flm")):
        more = "--resume --max-steps 61 --lr .001 --micro-batch-size 3"
        assert "a.txt: not found" in attempt(program, f"{RUN} {more}")
        assert not attempt(program, f"{RUN} {more} --dataset b.txt")
        assert not attempt(program, f"{RUN} {more} --dataset b.txt --max-steps 62")
        content = flm.load_checkpoint(Path(f"r/{kind}.pt"))
        assert content["step"] == 62 and content["config"]["dataset"] == "b.txt"
        assert content["log"][-1]["lr"] == pytest.approx(0.001 / 62)  # linear decay

@pytest.mark.parametrize("program", [distill, baselines])
def test_other_token_ids_are_refused_and_no_file_changes(flow, program):
    assert not attempt(program, f"{RUN} --max-steps 1")
    content = flm.load_checkpoint(CHECKPOINT)
    content["tokenizer"]["chars"] = content["tokenizer"]["chars"][::-1]
    torch.save(content, CHECKPOINT)
    before = {path: path.read_bytes() for path in Path("r").iterdir()}
    for flag in ("--resume", "--overwrite"):
        assert attempt(program, f"{RUN} {flag}").startswith("--dataset a.txt: ")
        assert {path: path.read_bytes() for path in Path("r").iterdir()} == before

@pytest.mark.parametrize("error", ["data.UserError", "ValueError"])
def test_a_process_that_fails_ends_all(folder, error):
    """Rank 1 fails in its first step. Rank 0 would wait for its gradients."""
    Path("fails.py").write_text(f"""
import data, flm
def broken(model, tokens, flow_loss=flm.flow_loss):
    if flm.rank() == 1:
        raise {error}("rank 1 has failed")
    return flow_loss(model, tokens)
flm.flow_loss = broken
flm.run(flm.main)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "fails.py", *FLOW.split()], timeout=60, capture_output=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)))
    assert done.returncode and b"rank 1 has failed" in done.stderr

def test_a_training_may_run_in_a_thread_and_twice_in_a_process(whole, folder, monkeypatch):
    """Notebooks do both. LOCAL_RANK alone, which a notebook on a cluster may have, is ignored."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    thread = threading.Thread(target=run, args=(flm, FLOW))
    thread.start()
    thread.join()
    assert_same_training(whole)
    run(flm, f"{FLOW} --overwrite")
    assert_same_training(whole)

def test_no_copy_to_the_device_is_asynchronous():
    """A row could be overwritten before a GPU has read it."""
    files = [HERE / "flm.py", HERE / "distill.py", HERE / "data.py"]
    for path in [*files, *(HERE / "extras").glob("*.py")]:
        assert not re.search("non_blocking|ctypes", path.read_text()), path
