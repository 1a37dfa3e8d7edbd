"""Pictures of trainings.

    python -m extras.plot runs/sentences                 # writes runs/sentences/training.png
    python -m extras.plot runs/x1 runs/x4 runs/x16       # writes runs/x1/scaling.png

One folder: for each of its models, training loss and held-out loss against steps, and the held-out
loss by tenth of tau of the last evaluation. Losses of different kinds of models are not comparable.
Several folders: measures of `extras.evaluate` (its quality.json) against the seconds of training.
"""

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import flm
from data import UserError, readable

NAMES = "flm", "fmlm", "mdlm", "ar"
END = dict(marker=".", markevery=[-1])  # a training of one step has one point and no line
TRAINING = dict(color="0.6", linewidth=1, label="training loss, one batch")
HELD_OUT = dict(color="black", linestyle="--", marker="o", markersize=4,
                label="held-out loss, averaged weights")
CURVES = {("flm", 16): "C6o--", ("flm", 64): "C0o-", ("fmlm", 1): "C1^:", ("fmlm", 4): "C2v:",
          ("mdlm", 4): "C3s--", ("mdlm", 16): "C7D:", ("mdlm", 64): "C4D--", ("ar", "L"): "C5x-."}
MEASURES = "perplexity / mdlm 64", "variation", "reverse", "copied"

def read_logs(folder):
    """The log of each trained model in a run folder, by name. Raises UserError."""
    logs = {}
    for name in NAMES:
        path = folder / f"{name}.pt"
        log = flm.load_checkpoint(path)["log"] if path.exists() else []
        if log:  # it is empty if the model was converted
            logs[name] = log
    if not logs:
        raise UserError(f"{folder}: has no model with a training log; train one, or check the path")
    return logs

def draw_training(figure, logs):
    """A row of two panels for each model; logs: as of read_logs."""
    panels = figure.subplots(len(logs), 2, squeeze=False)
    for (left, right), (name, log) in zip(panels, logs.items()):
        evaluations = [entry for entry in log if "heldout" in entry]
        left.plot(*columns(log, "loss"), **TRAINING, **END)
        left.plot(*columns(evaluations, "heldout"), **HELD_OUT)
        left.set(title=f"{name}: loss", ylabel="nats per position", xlabel="step", xlim=(0, None))
        last = evaluations[-1]
        middles = [0.05 + 0.1 * tenth for tenth in range(10)]  # a tenth without a row is NaN
        right.plot(middles, last["by_tau"], color="black", linestyle=":", marker="s", markersize=4)
        right.set(title=f"{name}: held-out loss, step {last['step']:,}", xlabel="tau", xlim=(0, 1))
    figure.legend(handles=panels[0, 0].get_lines(), loc="outside upper center", ncols=2,
                  frameon=False)

def columns(entries, key):
    """The steps of the entries, and their values of a key."""
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]

def read_points(folder):
    """(seconds of training, measures at temperature 1) by model and steps. Raises UserError.

    The perplexity is divided by that of masked diffusion in 64 steps at the same diversity.
    """
    seconds = {name: log[-1]["seconds"] for name, log in read_logs(folder).items()}
    seconds["fmlm"] = seconds.get("flm", 0) + seconds.get("fmlm", 0)  # a map needs its flow
    with readable(folder / "quality.json", "run extras.evaluate with this folder first"):
        tables = json.loads((folder / "quality.json").read_text())["tables"]
    nats, samples, equal, _ = tables.values()
    ratios = {(row["model"], row["steps"]): row["perplexity"] / row["mdlm 64"]
              for row in equal if row.get("mdlm 64")}
    points = {}
    for row in samples:
        if row["temperature"] == 1:
            name, steps = row["model"], row["steps"]
            copied = nats[0]["copied"] if name == "flm" else None
            measures = row | {"copied": copied, MEASURES[0]: ratios.get((name, steps))}
            points[name, "L" if name == "ar" else steps] = seconds[name], measures
    return points

def draw_scaling(figure, folders):
    """A panel for each measure, a curve for each (model, steps), a point for each folder."""
    runs = [read_points(folder) for folder in folders]
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES):
        for curve, style in CURVES.items():
            points = [run[curve] for run in runs if curve in run]
            points = [(x, row[measure]) for x, row in points if row[measure]]
            if points:
                axes.plot(*zip(*sorted(points)), style, label="{}, steps: {}".format(*curve))
        axes.set(xlabel="seconds of training", ylabel=measure, xlim=(0, None))
    figure.legend(handles=figure.axes[1].lines, loc="outside upper center", ncols=4)

def main(argv):
    parser = flm.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, help="file to write (default: in the first folder)")
    args = parser.parse_args(argv)
    first, *others = args.run_dir
    path = args.out or first / ("scaling.png" if others else "training.png")
    # pyplot would load the backend that Jupyter exports to its child processes
    from matplotlib.figure import Figure
    logs = read_logs(first)
    rows = 3 if others else len(logs)
    figure = Figure(figsize=(10, 0.5 + 2.8 * rows), layout="constrained")
    if others:
        draw_scaling(figure, args.run_dir)
    else:
        draw_training(figure, logs)
    part = Path(f"{path}.part")  # replaces the old picture, completely or not at all
    try:
        figure.savefig(part, format=path.suffix[1:], dpi=120)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"--out {path}: {error!s:.200}; use another path") from None
    print(f"wrote {path}")

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # an invalid name is an error of `import matplotlib`
    flm.run(main)
