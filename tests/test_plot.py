"""extras/plot.py: the picture of a training."""

import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import distill
import flm
from data import UserError
from extras import plot
from test_flm import TINY, run

HERE = Path(__file__).parent.parent

@pytest.fixture
def trained(folder):
    run(flm, f"{TINY} --max-steps 2 --eval-every 1 --run-dir r")
    return folder / "r"

@pytest.mark.parametrize("backend", ["module://no_such_backend", "nonsense"])
def test_the_backend_of_the_environment_is_not_used(trained, backend):
    """As in a process that Jupyter starts, where the backend that it exports is not installed."""
    done = subprocess.run([sys.executable, "-m", "extras.plot", str(trained)], cwd=HERE, text=True,
                          capture_output=True, env=os.environ | {"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    with Image.open(trained / "training.png") as picture:
        assert picture.convert("L").getextrema() == (0, 255)  # black on white

def test_the_picture_shows_the_logs(trained):
    run(distill, "--run-dir r --max-steps 1 --device cpu")
    logs = plot.read_logs(trained)
    assert list(logs) == ["flm", "fmlm"] and [entry["step"] for entry in logs["flm"]] == [1, 2]
    first, last = logs["flm"]
    last["by_tau"][3] = math.nan
    panels = plot.make_figure(logs).axes
    assert len(panels) == 6
    loss, heldout = panels[0].get_lines()
    assert loss.get_xydata().tolist() == [[1, first["loss"]], [2, last["loss"]]]
    assert heldout.get_xydata().tolist() == [[1, first["heldout"]], [2, last["heldout"]]]
    (by_tau,) = panels[1].get_lines()
    assert by_tau.get_xdata() == pytest.approx([k / 10 + 1 / 20 for k in range(10)])
    assert by_tau.get_ydata() == pytest.approx(last["by_tau"], nan_ok=True)
    assert panels[2].get_lines()[0].get_ydata().tolist() == [first["lr"], last["lr"]]
    assert panels[3].get_title() == "fmlm: loss"

def test_a_run_without_an_evaluation_has_a_picture(folder):
    entry = dict(step=20, loss=3.0, lr=1e-3, seconds=1.0)
    plot.save(plot.make_figure(dict(ar=[entry])), folder / "new/ar.svg")
    assert "</svg>" in (folder / "new/ar.svg").read_text()

def test_a_full_disk_does_not_destroy_the_earlier_picture(trained):
    """Simulated by a limit on the size of files: 1000 bytes, less than the picture has."""
    run(plot, "r")
    before = {path: path.read_bytes() for path in trained.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            plot.main(["r"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in trained.iterdir()}

def test_mistakes_are_one_line(trained):
    for line, message in [("nowhere", "nowhere: has no model"),
                          ("r --out a.txt/p.png", "a.txt/p.png: cannot be written"),
                          ("r --out p.doc", "must end with .png")]:
        with pytest.raises(UserError, match=message) as error:
            run(plot, line)
        assert "\n" not in str(error.value)
    assert not list(trained.glob("*.part"))
