"""Programs in this process, and in processes that a test can kill. These are forked from a server
that has imported everything, so they train at once."""

import io
import multiprocessing
import os
import resource
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

import flm

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["nursery", "distill", "filelock", "torch._dynamo"])

def attempt(program, argv):
    """The one line of a mistake, or "" if the command succeeds. Fails if it ends otherwise."""
    argv = shlex.split(argv) if isinstance(argv, str) else argv
    err, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *argv])
        patch.setattr(sys, "stderr", err)
        try:
            flm.run(program.main)
        except SystemExit as end:
            status = end.code or 0
    message = err.getvalue().rpartition("program: ")[2] if status else ""
    assert (status, message.count("\n")) in [(0, 0), (2, 1)], err.getvalue()
    return message

def run_child(main, line, most_bytes):
    os.dup2(os.open("err", os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    sys.argv = ["program", *shlex.split(line)]
    flm.run(main)

def finish(program, line, most_bytes=resource.RLIM_INFINITY, kill_when=None, delay=0.0):
    """The exit status of a process with its stderr in the file err, which cannot write a file of
    more than `most_bytes` and is killed `delay` seconds after kill_when() becomes true."""
    Path("err").write_text("")
    child = FORKS.Process(target=run_child, args=(program.main, line, most_bytes), daemon=True)
    child.start()
    if kill_when:
        while child.is_alive() and not kill_when():
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
    child.join(120)
    return child.exitcode
