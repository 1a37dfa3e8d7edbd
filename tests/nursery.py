"""Processes that run a program, to be hurt: forked from one that has imported all, so that they are at work at once."""

import multiprocessing
import os
import resource
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
from conftest import tally  # noqa: E402

import baselines  # noqa: E402
import convert  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import flm  # noqa: E402
from run import guard, read_checkpoint  # noqa: E402

MAINS = {"flm.py": flm.main, "distill.py": distill.main, "baselines.py": baselines.main, "evaluate.py": evaluate.main,
         "convert.py": convert.main}
PARENT = multiprocessing.get_context("forkserver")
PARENT.set_forkserver_preload(["nursery", "tqdm", "matplotlib.figure", "filelock", "torch._dynamo"])


def live(program: str, line: str, folder: Path, name: str, most: int | None) -> None:
    os.chdir(folder)
    for number, end in enumerate(("out", "err"), start=1):
        os.dup2(os.open(f"{name}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    sys.argv = [program, *shlex.split(line)]
    sys.exit(guard(MAINS[program], program not in ("evaluate.py", "convert.py")))


class Child:
    """`program line` at work in a folder, no file of it larger than `most` bytes; .out and .err are what it has printed."""

    def __init__(self, program: str, line: str, folder: Path, most: int | None = None):
        self.path = folder / f"{program}.{time.monotonic_ns()}"
        self.process = PARENT.Process(target=live, args=(program, line, folder, self.path.name, most))
        self.process.start()
        tally["faults caused"] += most is not None
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self.path.with_name(self.path.name + ".out").read_text()

    @property
    def err(self) -> str:
        path = self.path.with_name(self.path.name + ".err")
        return path.read_text() if path.exists() else ""

    def until(self, text: str, timeout: float = 60) -> "Child":
        """Waits until it has said so on standard error."""
        end = time.monotonic() + timeout
        while text not in self.err:
            assert time.monotonic() < end and self.process.is_alive(), f"never said {text}: {self.err[-2000:]}"
            time.sleep(0.002)
        return self

    def hit(self, number: int) -> "Child":
        os.kill(self.pid, number)
        tally["faults caused"] += 1
        return self

    def status(self, timeout: float = 120) -> int:
        """Its exit status, below 0 if a signal has killed it."""
        self.process.join(timeout)
        assert not self.process.is_alive(), f"still at work: {self.err[-2000:]}"
        return self.process.exitcode


def last_line(text: str) -> str:
    return text.replace("\r", "\n").strip().splitlines()[-1]


def same(one: Path, two: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    def equal(a, b) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return equal(read_checkpoint(one), read_checkpoint(two))
