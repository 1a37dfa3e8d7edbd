"""extras/plot.py: the pictures of trainings."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

import distill
import flm
from data import UserError
from extras import plot
from test_flm import HERE, TINY, run

def test_the_picture_shows_the_log_and_survives_a_full_disk(folder, monkeypatch):
    """A limit of 1000 bytes, less than the picture has, on the size of files is a full disk."""
    run(flm, f"{TINY} --max-steps 2 --eval-every 1 --run-dir r")
    logs = plot.read_logs(folder / "r")
    figure = Figure()
    plot.draw_training(figure, logs)
    lines = figure.axes[0].get_lines()
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
        with pytest.raises(UserError, match="use another path"):
            plot.main(["r"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path: path.read_bytes() for path in (folder / "r").iterdir()}

def test_curves_over_runs(folder):
    """A map is placed at the seconds of its flow and its own, other models at their own."""
    names = "model", "steps", "temperature", "perplexity", "variation", "reverse"
    samples = [dict(zip(names, row)) for row in [
        (None, None, None, 9.0, 0.6, 20.0), ("flm", 64, 0.9, 50.0, 0.7, None),
        ("flm", 64, 1.0, 60.0, 0.8, 90.0), ("fmlm", 1, 1.0, 80.0, 0.9, None)]]
    tables = dict(nats=[dict(model="flm", nats=4.0, copied=0.5)], samples=samples,
                  equal=[dict(model="flm", steps=64, perplexity=60, **{"mdlm 64": 40})], as_good=[])
    for name, lengths in (("r", (1, 2)), ("s", (2, 4))):
        for kind, steps in zip(("flm", "fmlm"), lengths):
            program = distill if kind == "fmlm" else flm
            line = f"--device cpu --run-dir {name} --max-steps {steps}"
            run(program, line if kind == "fmlm" else f"{TINY} {line}")
        Path(name, "quality.json").write_text(json.dumps(dict(tables=tables)))
    points = plot.read_points(folder / "r")
    first, second = (log[-1]["seconds"] for log in plot.read_logs(folder / "r").values())
    seconds, flow = points["flm", 64]
    assert seconds == first and [flow[name] for name in plot.MEASURES] == [1.5, 0.8, 90, 0.5]
    seconds, fmap = points["fmlm", 1]
    assert seconds == first + second
    assert [fmap[name] for name in plot.MEASURES] == [None, 0.9, None, None]
    plot.main(["r", "s"])
    assert Image.open("r/scaling.png").convert("L").getextrema() == (0, 255)
