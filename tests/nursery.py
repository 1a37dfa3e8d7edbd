"""Programs in forked processes, which a test can signal, kill or restrict.

They are forked from a server that has imported everything, so they start to train at once.
"""

import multiprocessing
import os
import resource
import shlex
import sys
import time
from pathlib import Path

import torch

import distill
import flm

PROGRAMS = {"flm.py": flm, "distill.py": distill}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["nursery", "tqdm", "matplotlib.figure", "filelock", "tokenizers", "torch._dynamo"])

def run_program(program, line, path, limits):
    """The body of a child: writes its stderr to `path`."""
    os.chdir(path.parent)
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, buffering=1)
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    sys.argv = [program, *shlex.split(line)]
    flm.run_command(PROGRAMS[program].main)

class Child:
    """`PROGRAM LINE` in the working folder, with resource limits; .err is its stderr so far."""

    def __init__(self, program, line, limits=None):
        self.path = Path(f"{program}.{time.monotonic_ns()}.err").resolve()
        self.path.touch()
        arguments = program, line, self.path, limits or {}
        self.process = FORKS.Process(target=run_program, args=arguments, daemon=True)
        self.process.start()

    @property
    def err(self):
        return self.path.read_text()

    def until(self, condition, timeout=60):
        """Waits until condition() holds, or until stderr contains a string."""
        end = time.monotonic() + timeout
        while not (condition in self.err if isinstance(condition, str) else condition()):
            assert time.monotonic() < end and self.process.is_alive(), self.err[-2000:]
            time.sleep(0.001)
        return self

    def send(self, number):
        os.kill(self.process.pid, number)
        return self

    def status(self, timeout=120):
        """The exit status; negative if a signal killed the process."""
        self.process.join(timeout)
        assert not self.process.is_alive() and "Traceback" not in self.err, self.err[-2000:]
        return self.process.exitcode

    def last_line(self):
        return self.err.replace("\r", "\n").strip().splitlines()[-1]
