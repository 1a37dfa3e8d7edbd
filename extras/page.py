"""HTML page that animates how a flow and its map turn noise into texts.

    python -m extras.page --run-dir pretrained/sentences --out page.html

The page is one file. It shows the most probable token of every position after each evaluation of
the flow (flm.pt) and, if there is one, of the map (fmlm.pt), which start from the same noise.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import distill
import flm
from data import UserError

TEMPLATE = Path(__file__).with_name("page.html")
setting = partial(flm.setting, "page")

@dataclass
class Config(flm.Config):
    """Settings of the page. The inherited ones are not used."""

    run_dir: str = setting("pretrained/sentences", "folder of flm.pt and fmlm.pt")
    out: str = setting("page.html", "file to write")
    num_samples: int = setting(16, "number of texts")
    sample_steps: int = setting(32, "evaluations of the flow")
    map_steps: int = setting(4, "evaluations of the map")
    seed: int = setting(0, "seed of the noise")

@torch.no_grad()
def record(model, n, steps, seed):
    """The most probable text after each evaluation: ids and percent, (steps, n, L) each."""
    generator = torch.Generator().manual_seed(seed)
    sampler = distill.few_steps if model.time_t else flm.euler
    batches = []
    for known in flm.batches(model, n):
        state = model.noise(len(known), generator)
        denoiser = partial(flm.denoise, model, known, 1.0)
        frames = []
        for _, _, probs in sampler(denoiser, state, model.clock, steps, model.clean):
            ids = flm.most_probable(model, probs, known)
            p = probs.gather(-1, ids[..., None])[..., 0]
            percent = (100 * p).round().long()
            frames.append(torch.stack([ids, percent]))
        batches.append(torch.stack(frames))  # (steps, 2, B, L)
    return torch.cat(batches, dim=2).unbind(1)

def token_text(tokenizer, i):
    """The text that token i adds after another token, with its space; "" for an end token."""
    once = tokenizer.decode([i])
    twice = tokenizer.decode([i, i])
    return twice[len(once) :]

def make_page(models, n, seed):
    """The page as a string; models: (name, model, steps) of each."""
    animations, texts = [], {}
    for name, model, steps in models:
        ids, percent = record(model, n, steps, seed)
        animations.append(dict(name=name, ids=ids.tolist(), percent=percent.tolist()))
        for i in ids.unique().tolist():
            texts[i] = token_text(model.tokenizer, i)
    content = dict(tokens=texts, models=animations)
    content = json.dumps(content, separators=(",", ":"))
    content = content.replace("<", "\\u003c")  # a text cannot close the script
    return TEMPLATE.read_text(encoding="utf-8").replace("CONTENT", content)

def main(argv):
    config = Config(**flm.parse(argv, Config, __doc__, groups=("page",)))
    flm.check(config)
    folder, path = Path(config.run_dir), Path(config.out)
    models = [("Flow", flm.load(folder / "flm.pt"), config.sample_steps)]
    if (folder / "fmlm.pt").exists():
        models.append(("Map", flm.load(folder / "fmlm.pt"), config.map_steps))
    page = make_page(models, config.num_samples, config.seed)
    part = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)  # completely or not at all
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"--out {path}: {error.strerror}; use another path") from None
    print(f"wrote {path}, {len(page.encode()) / 1024:.0f} KiB")

if __name__ == "__main__":
    flm.run(main)
