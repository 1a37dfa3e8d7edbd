"""HTML page that animates how a flow and its map turn noise into texts.

    python -m extras.page --run-dir runs/sentences --out page.html

The page is one file and loads nothing else. It shows the most probable token of every position
after each evaluation of the flow (flm.pt) and, if the run has one, of the map (fmlm.pt). Both
start from the same noise. The last texts are those of `flm.py --sample` and `distill.py --sample`.
"""

import json
from pathlib import Path

import torch

import distill
import flm

TEMPLATE = Path(__file__).with_name("page.html")

def solve(model, rows, steps):
    """Generator of (tau, state, probs): the sampler of a flow or of a map."""
    arguments = model.noise(rows), model.clock, steps, model.clean
    if model.kind == "fmlm":
        delta = distill.mean_denoiser(model)
        return distill.few_steps(delta, *arguments, noise=None)

    def denoiser(state, tau_s, tau_t):
        return model(state, tau_s).softmax(-1)
    return flm.euler(denoiser, *arguments)

def record(model, n, steps, seed):
    """The most probable text after each evaluation: ids and percent, (steps, n, L) each."""
    def best(rows, known):
        frames = []
        for _, _, probs in solve(model, rows, steps):
            ids = flm.most_probable(model, probs)
            p = probs.gather(-1, ids[..., None])[..., 0]
            percent = (100 * p).round().long()
            frames.append(torch.stack([ids, percent]))
        return torch.stack(frames).permute(2, 0, 1, 3)  # (B, steps, 2, L)

    frames = flm.in_batches(model, n, seed, best)
    return frames.permute(2, 1, 0, 3).unbind()

def token_text(tokenizer, i):
    """The text that token i adds after another token, with its space; "" for an end token."""
    once = tokenizer.decode([i])
    twice = tokenizer.decode([i, i])
    return twice[len(once) :]

def make_page(models, n, seed):
    """The page as a string; models: pairs (model, steps)."""
    animations, texts = [], {}
    for model, steps in models:
        ids, percent = record(model, n, steps, seed)
        animations.append(dict(
            name="Map" if model.kind == "fmlm" else "Flow",
            ids=ids.tolist(),
            percent=percent.tolist()))
        for i in ids.unique().tolist():
            texts[i] = token_text(model.tokenizer, i)
    content = dict(tokens=texts, models=animations)
    content = json.dumps(content, separators=(",", ":"))
    content = content.replace("<", "\\u003c")  # a text cannot close the script
    return TEMPLATE.read_text(encoding="utf-8").replace("CONTENT", content)

def positive(text):
    """An argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)

def main(argv):
    parser = flm.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run-dir", type=Path, default="runs/sentences", help="folder of flm.pt and fmlm.pt")
    add("--out", type=Path, default="page.html", help="file to write")
    add("--num-samples", type=positive, default=16, help="number of texts")
    add("--sample-steps", type=positive, default=32, help="evaluations of the flow")
    add("--map-steps", type=positive, default=4, help="evaluations of the map")
    add("--seed", type=int, default=0, help="seed of the noise")
    args = parser.parse_args(argv)
    models = [(flm.load(args.run_dir / "flm.pt"), args.sample_steps)]
    if (args.run_dir / "fmlm.pt").exists():
        models.append((flm.load(args.run_dir / "fmlm.pt"), args.map_steps))
    page = make_page(models, args.num_samples, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    size = args.out.stat().st_size / 1024
    print(f"wrote {args.out}, {size:.0f} KiB")

if __name__ == "__main__":
    flm.run_command(main)
