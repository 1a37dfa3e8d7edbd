"""Signals, kills, full disks and damaged files: the last checkpoint survives, and a run goes on."""

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Call
from nursery import Child

import flm
from data import UserError
from test_flm import HERE, TEXT, TINY, assert_equal, run

FLOW = f"{TINY} --width 12 --dropout .1 --run-dir r --max-steps 60 --eval-every 20"
MAP = "--run-dir r --device cpu --max-steps 60 --eval-every 20"
PROGRAMS = [("flm.py", "flm", FLOW), ("distill.py", "fmlm", MAP)]
RESUME = "--run-dir r --device cpu --resume"

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of a flow and its map that were trained without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        Path("a.txt").write_text(TEXT)
        for program, _, line in PROGRAMS:
            assert Child(program, line).status() == 0
        return Path("r").resolve()

def copy_flow(whole):
    shutil.copytree(whole, "r", ignore=shutil.ignore_patterns("fmlm.*"))

def assert_same_training(whole, kind="flm"):
    """r/KIND.pt has the steps, weights, averages and optimizer states of `whole`."""
    a, b = (flm.load_checkpoint(Path(folder, f"{kind}.pt")) for folder in ("r", whole))
    for name in ("step", "model", "average", "optimizers"):
        assert_equal(a[name], b[name])

def test_a_second_signal_exits_at_once(folder):
    """One step of this batch takes days; the first signal waits for its end."""
    child = Child("flm.py", f"{FLOW} --batch-size {2**30} --width 256").until("0/60", 15)
    time.sleep(1)
    child.send(signal.SIGTERM)
    time.sleep(1)
    assert child.process.is_alive()
    assert child.send(signal.SIGTERM).status(5) == 128 + signal.SIGTERM

@pytest.mark.parametrize("program, kind, line, kills, every", [
    (*PROGRAMS[0], 20, 1), (*PROGRAMS[1], 6, 3)])
def test_kills_at_any_moment_change_nothing(whole, folder, program, kind, line, kills, every):
    """SIGKILL at random moments; every other one while a checkpoint is written or renamed."""
    if kind == "fmlm":
        copy_flow(whole)
    child, moments = Child(program, f"{line} --eval-every {every}"), random.Random(0)
    for i in range(kills):
        child.until(Path(f"r/{kind}.part").exists if i % 2 else "/60 [")  # the progress bar
        time.sleep(moments.uniform(0, 0.01 if i % 2 else 0.3))
        assert child.send(signal.SIGKILL).status() == -signal.SIGKILL
        child = Child(program, RESUME)
    assert child.status() == 0
    assert_same_training(whole, kind)
    log = flm.load_checkpoint(Path(f"r/{kind}.pt"))["log"]
    assert [entry["step"] for entry in log if "heldout" in entry] == list(range(every, 61, every))

@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(folder):
    """The process without a signal would otherwise wait for gradients of the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open("err", "w") as err:
        torchrun = subprocess.Popen([*command, str(HERE / "flm.py"), *FLOW.split()], stderr=err)
    while "step 20:" not in Path("err").read_text():
        assert torchrun.poll() is None, Path("err").read_text()
        time.sleep(0.01)
    workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGTERM)
    assert torchrun.wait(30) != 0
    step = flm.load_checkpoint(Path("r/flm.pt"))["step"]
    assert f"contains step {step}; continue with --resume" in Path("err").read_text()
    assert Child("flm.py", RESUME).status() == 0
    assert 20 < step < flm.load_checkpoint(Path("r/flm.pt"))["step"] == 60

def test_a_full_disk_keeps_the_last_checkpoint(whole, folder):
    """The limit is on the size of a file. First it is too small for the token files."""
    child = Child("flm.py", FLOW, {resource.RLIMIT_FSIZE: 4000})
    assert child.status() == 2 and "File too large" in child.last_line()
    assert not [path for path in Path("data").iterdir() if path.is_dir()]
    child = Child("flm.py", FLOW).until("step 20:").send(signal.SIGTERM)
    assert child.status() == 128 + signal.SIGTERM
    before = Path("r/flm.pt").read_bytes()
    child = Child("flm.py", RESUME, {resource.RLIMIT_FSIZE: len(before) // 2})
    assert child.status() == 2 and "r/flm.pt: cannot be written" in child.last_line()
    assert Path("r/flm.pt").read_bytes() == before and not Path("r/flm.part").exists()
    assert Child("flm.py", RESUME).status() == 0
    assert_same_training(whole)

def test_a_damaged_checkpoint_is_refused_or_complete(whole, folder):
    """Truncated at 20 places, or with one of 200 bits changed."""
    copy_flow(whole)
    path, places, refused = Path("r/flm.pt"), random.Random(0), 0
    good = path.read_bytes()
    damaged = [bytearray(good[: len(good) * i // 20]) for i in range(20)]
    for _ in range(200):
        damaged.append(bytearray(good))
        damaged[-1][places.randrange(len(good))] ^= 1 << places.randrange(8)
    for bad in damaged:
        path.write_bytes(bad)
        try:
            assert_same_training(whole)
        except UserError as error:
            refused += 1
            assert str(error).startswith("r/flm.pt: ") and "\n" not in str(error)
    assert refused > 0.9 * len(damaged)  # the rest is padding
    os.replace("r/flm.prev.pt", path)  # the message proposes it
    assert Child("flm.py", RESUME).status() == 0
    assert_same_training(whole)

def test_foreign_files_are_one_line_and_never_executed(whole, folder):
    copy_flow(whole)
    path, content = Path("r/flm.pt"), flm.load_checkpoint(whole / "flm.pt")
    empty_zip = b"PK\5\6" + bytes(18)
    files = [b"", b'{"kind": "flm"}', pickle.dumps(Call(open)), empty_zip, Call(open)]
    files += [content | dict(kind=Call(open)), [1, 2], dict(step=3, ema=[torch.zeros(2)])]
    for name in content.keys() - {"source", "log", "step"}:
        files += [content | {name: value} for value in (None, [], {"a": torch.zeros(2)}, "mdlm")]
    for file in files:
        if isinstance(file, bytes):
            path.write_bytes(file)
        else:
            torch.save(file, path)
        for line in ("--sample --run-dir r --num-samples 1 --sample-steps 1", RESUME):
            try:
                run(flm, line)
            except UserError as error:
                assert str(error).startswith("r/flm.pt: ") and "\n" not in str(error)
            assert not Path("executed").exists()

def test_a_second_run_in_a_folder_is_refused(folder):
    first = Child("flm.py", f"{FLOW} --max-steps 6000").until("step 20:")
    for program, line in (("flm.py", FLOW), ("flm.py", RESUME), ("distill.py", MAP)):
        second = Child(program, line)
        assert second.status() == 2
        assert f"{program}: r: in use by another process" in second.last_line()
    first.send(signal.SIGKILL).status()
    assert Child("distill.py", f"{MAP} --max-steps 1").status() == 0

def test_a_loss_that_is_not_a_number_keeps_the_last_checkpoint(whole, folder, monkeypatch):
    def broken(model, tokens, rows, flow_loss=flm.flow_loss):
        nats, tau = flow_loss(model, tokens, rows)
        return nats * (torch.nan if rows.step == 24 else 1), tau
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is not a number.*--lr"):
        patch.setattr(flm, "flow_loss", broken)
        run(flm, FLOW)
    assert flm.load_checkpoint(Path("r/flm.pt"))["step"] == 20
    run(flm, RESUME)
    assert_same_training(whole)

@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write")
@pytest.mark.parametrize("name", ["r", "data"])
def test_a_read_only_folder_is_one_line(folder, name):
    Path(name).mkdir(mode=0o555)
    command = [sys.executable, str(HERE / "flm.py"), *FLOW.split()]
    if os.geteuid() == 0:
        command[:0] = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr and name in done.stderr

def test_a_missing_tokenizer_is_one_line_and_resuming_restores_it(whole, folder):
    copy_flow(whole)
    Path("r/tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        run(flm, "--sample --run-dir r")
    run(flm, RESUME)
    assert Path("r/tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()

@pytest.mark.parametrize("flags", ["--width 16384 --depth 64", "--seq-len 2000000000"])
def test_running_out_of_memory_is_one_line(folder, flags):
    child = Child("flm.py", f"{FLOW} {flags}", {resource.RLIMIT_AS: 3 * 2**30})
    assert child.status() == 2 and "out of memory" in child.last_line()
