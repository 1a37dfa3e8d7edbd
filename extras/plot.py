"""Picture of the training of all models in a run folder: loss and learning rate.

    python -m extras.plot runs/sentences                 # writes runs/sentences/training.png
    python -m extras.plot runs/sentences --out loss.pdf

The picture has a row for each of flm.pt, fmlm.pt, mdlm.pt and ar.pt that exists: training loss and
held-out loss against steps, the held-out loss by tenth of tau of the last evaluation, and the
learning rate. Losses of different kinds of models are not comparable, so they have separate axes.
"""

import contextlib
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import flm
from data import UserError

NAMES = "flm", "fmlm", "mdlm", "ar"
FORMATS = ".png", ".pdf", ".svg"
END = dict(marker=".", markevery=[-1])  # a training of one step has one point and no line
TRAINING = dict(color="0.6", linewidth=1, label="training loss, one batch")
HELD_OUT = dict(color="black", linestyle="--", marker="o", markersize=4,
                label="held-out loss, averaged weights")

def read_logs(folder):
    """The log of each trained model in a run folder, by name. Raises UserError."""
    logs = {}
    for name in NAMES:
        path = folder / f"{name}.pt"
        if path.exists():
            logs[name] = flm.load_checkpoint(path)["log"]  # empty if it was converted
    logs = {name: log for name, log in logs.items() if log}
    if not logs:
        raise UserError(f"{folder}: has no model with a training log; train one, or check the path")
    return logs

def make_figure(logs):
    """A matplotlib figure with a row of three panels for each model; logs: as of read_logs."""
    # pyplot would load the backend that Jupyter exports to its child processes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.5 + 2.8 * len(logs)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    panels = figure.subplots(len(logs), 3, squeeze=False)
    for row, (name, log) in zip(panels, logs.items()):
        evaluations = [entry for entry in log if "heldout" in entry]
        draw_losses(row[0], name, log, evaluations)
        draw_by_tau(row[1], name, evaluations)
        draw_lr(row[2], name, log)
    lines = panels[0, 0].get_lines()
    figure.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False)
    return figure

def draw_losses(axes, name, log, evaluations):
    axes.plot(*columns(log, "loss"), **TRAINING, **END)
    axes.plot(*columns(evaluations, "heldout"), **HELD_OUT)
    axes.set(title=f"{name}: loss", ylabel="nats per position")
    axes.ticklabel_format(axis="y", useOffset=False)
    step_axis(axes)

def draw_by_tau(axes, name, evaluations):
    """Each point is the middle of a tenth of tau. A tenth without a row (NaN) has no point."""
    axes.set(title=f"{name}: no evaluation yet", xlim=(0, 1), xlabel="tau")
    if evaluations:
        last = evaluations[-1]
        middles = [0.05 + 0.1 * tenth for tenth in range(10)]
        axes.plot(middles, last["by_tau"], color="black", linestyle=":", marker="s", markersize=4)
        axes.set(title=f"{name}: held-out loss, step {last['step']:,}", ylabel="nats per position")
    axes.ticklabel_format(axis="y", useOffset=False)

def draw_lr(axes, name, log):
    axes.plot(*columns(log, "lr"), color="black", **END)
    axes.set(title=f"{name}: learning rate", ylim=(0, None))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    step_axis(axes)

def columns(entries, key):
    """The steps of the entries, and their values of a key."""
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]

def step_axis(axes):
    """Whole numbers as labels, short ones, as 200k, which do not overlap in long trainings."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="step", xlim=(0, None))

def save(figure, path):
    """Replaces the picture at path, completely or not at all. Raises UserError."""
    part = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, format=path.suffix[1:], dpi=120)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"--out {path}: cannot be written ({error!s:.200}); the earlier "
                        "picture is intact; free disk space, or use another path") from None

def main(argv):
    parser = flm.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder with flm.pt, fmlm.pt, mdlm.pt or ar.pt")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/training.png)")
    args = parser.parse_args(argv)
    path = args.out or args.run_dir / "training.png"
    if path.suffix not in FORMATS:
        raise UserError(f"--out {path}: must end with {' or '.join(FORMATS)}")
    save(make_figure(read_logs(args.run_dir)), path)
    print(f"wrote {path}")

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # an invalid name is an error of `import matplotlib`
    flm.run(main)
