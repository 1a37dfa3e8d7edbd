"""extras/plot.py: the picture of a training."""

import resource
import subprocess
import sys

import pytest
from PIL import Image

import flm
from data import UserError
from extras import plot
from test_flm import HERE, TINY, run

def test_the_picture_shows_the_log_and_survives_a_full_disk(folder, monkeypatch):
    """A limit of 1000 bytes, less than the picture has, on the size of files is a full disk."""
    run(flm, f"{TINY} --max-steps 2 --eval-every 1 --run-dir r")
    logs = plot.read_logs(folder / "r")
    lines = plot.make_figure(logs).axes[0].get_lines()
    for line, name in zip(lines, ("loss", "heldout"), strict=True):
        assert line.get_xydata().tolist() == [[e["step"], e[name]] for e in logs["flm"]]
    for backend in ("module://no_such_backend", "nonsense"):  # as if exported by Jupyter
        monkeypatch.setenv("MPLBACKEND", backend)
        subprocess.run([sys.executable, "-m", "extras.plot", folder / "r"], cwd=HERE, check=True)
    before = {path: path.read_bytes() for path in (folder / "r").iterdir()}
    assert Image.open("r/training.png").convert("L").getextrema() == (0, 255)  # black on white
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            plot.main(["r"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in (folder / "r").iterdir()}
