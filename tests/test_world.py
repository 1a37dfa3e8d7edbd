"""Terminals, pipes, folders and schedulers as people have them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import attempt

import distill
import flm
from test_flm import HERE, TEXT, TINY

FLOW = f"{TINY} --width 8 --max-steps 40 --eval-every 10 --sample-steps 2"
SAMPLE = "--sample --run-dir r --device cpu --num-samples 400 --sample-steps 2"

@pytest.fixture(scope="module", autouse=True)
def run_folder(tmp_path_factory):
    """A run folder r of a text with characters that ASCII and cp1252 lack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        Path("a.txt").write_text(TEXT.replace("a", "\u732b"), encoding="utf-8")
        assert not attempt(flm, f"{FLOW} --run-dir r")
        assert not attempt(distill, "--run-dir r --device cpu --max-steps 1")
        yield

def shell(line):
    """Runs a line of bash, in which FLM is python flm.py; returns status, stdout, stderr."""
    line = line.replace("FLM", f"{sys.executable} {HERE}/flm.py")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], env=env, capture_output=True)
    return done.returncode, done.stdout, done.stderr

@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_samples_are_printed_in_any_encoding(encoding):
    status, out, err = shell(f"PYTHONIOENCODING={encoding} FLM {SAMPLE}")
    assert status == 0 and out.count(b"\n") == 400 and b"?" in out and not err
    status, out, err = shell(f"PYTHONIOENCODING={encoding} FLM {FLOW} --run-dir {encoding}")
    assert status == 0 and b"steps: 64" in out and Path(encoding, "flm.pt").exists()

@pytest.mark.parametrize("redirect, lines", [
    ("| head -n 1", 1), (">&-", 0), ("2>&-", 400), (">&- 2>&-", 0), ("2>&1 | head -n 1", 1)])
def test_sampling_ends_silently_if_nobody_reads(redirect, lines):
    status, out, err = shell(f"FLM {SAMPLE} {redirect}")
    assert status in (0, 1) and out.count(b"\n") == lines and not err

@pytest.mark.parametrize("redirect", ["| head -n 1", ">&-", "2>&-", "2>&1 | head -n 1"])
def test_a_training_without_a_reader_can_be_continued(redirect):
    """Standard error that nobody reads any more stops it; --resume then starts or goes on."""
    shutil.rmtree("q", ignore_errors=True)
    _, _, err = shell(f"FLM {FLOW} --run-dir q {redirect}")
    assert b"Traceback" not in err and b"Exception" not in err
    assert not attempt(flm, f"{FLOW} --run-dir q --resume")
    assert flm.load_checkpoint(Path("q/flm.pt"))["step"] == 40

def test_a_moved_and_protected_checkpoint_is_enough_to_sample():
    expected = shell(f"FLM {SAMPLE}")
    Path("elsewhere/r").mkdir(parents=True)
    shutil.copy("r/flm.pt", "elsewhere/r")
    Path("elsewhere/r").chmod(0o555)
    assert shell(f"cd elsewhere && FLM {SAMPLE}") == expected
    assert [path.name for path in Path("elsewhere").rglob("*")] == ["r", "flm.pt"]

def test_a_scheduler_starts_the_same_command_twice():
    for steps in (40, 50):
        assert not attempt(flm, f"{FLOW} --run-dir twice --resume --max-steps {steps}")
        assert flm.load_checkpoint(Path("twice/flm.pt"))["step"] == steps

@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("extras/[a-z]*.py")))
def test_extras_run_as_files(name):
    status, out, _ = shell(f"{sys.executable} {HERE}/extras/{name}.py --help")
    assert status == 0 and b"--help" in out
