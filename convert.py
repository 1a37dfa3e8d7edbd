"""Makes a run of a released checkpoint, so that flm.py --sample, distill.py and evaluate.py can use it.

    python convert.py lm1b_flm.ckpt --dataset lm1b --run-dir runs/lm1b-released       # writes flm.pt
    python convert.py lm1b_fmlm.ckpt --dataset lm1b --run-dir runs/lm1b-released      # two times: fmlm.pt beside it
    python distill.py --sample --run-dir runs/lm1b-released

The paper's authors publish FLM and FMLM of lm1b and owt as checkpoints of Lightning. Sizes are read from the shapes; the
average weights are taken, as they are the ones evaluated. Nothing in the file is executed: whatever is not a tensor or a
plain value becomes an empty object.
"""

import argparse
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

import data
import distill
import flm
from run import (Parser, clear, config_file, first_line, guard, lasting, lock, program, unlocks, verify, write_checkpoint,
                 write_settings)
from sources import UserError

HEAD = 64  # width of an attention head of theirs
TRAINING = "learnable_loss_weighting."  # of no use afterwards
NAMES = [(r"^vocab_embed\.", ""), (r"^sigma_map_prime\.", "time_t."), (r"^sigma_map\.", "time_s."),
         (r"attn_qkv", "qkv"), (r"attn_out", "out"), (r"adaLN_modulation", "modulation"),
         (r"^output_layer\.norm_final\.", "norm."), (r"^output_layer\.linear\.", "head."), (r"^output_layer\.", "")]


class Nothing:
    """Stands for a class or function that is not to be trusted: takes all arguments and any state, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class NoDict(Nothing):
    def __new__(cls, *args):  # for a kind of dict, a plain one, which then takes the items
        return {}


class NoList(Nothing):
    def __new__(cls, *args):
        return []


def stand_in(name: str) -> type[Nothing]:
    """What to make in place of the class or function of this name."""
    return NoDict if name.lower().endswith("dict") else NoList if name.lower().endswith("list") else Nothing


def read(path: Path) -> dict:
    """The tensors and plain values of a .ckpt or .safetensors file. Raises UserError for what is neither, or damaged."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; the README tells where the released checkpoints are found")
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_safetensors(path)}
        verify(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(stand_in(name), name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, torch and pickle each raise their own
        reason = first_line(ValueError(re.sub(r"^Weights only(.|\n)*WeightsUnpickler error:\s*", "", str(error))))
        raise UserError(f"{path}: not a whole checkpoint, or it holds objects that cannot be passed over ({reason}); "
                        "download it again, or save its state_dict as .safetensors") from None


def load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: is read by safetensors; pip install safetensors") from None
    return load_file(path)


def weights(content: dict, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's parameters under our names: as trained, and their average, a list in the order of the former."""
    if isinstance(content, dict) and "kind" in content:
        raise UserError(f"{path}: is this program's own already; give its folder as --run-dir to what is to use it")
    try:
        trained = {name.replace("_orig_mod.", ""): value.float() for name, value in content["state_dict"].items()}
        if own := [name for name in trained if name.startswith("backbone.")]:  # a teacher may stand beside it
            trained = {name.removeprefix("backbone."): trained[name] for name in own}
        trained.pop("rotary_emb.inv_freq", None)  # no parameter
        average = trained
        if "ema" in content:
            average = dict(zip(trained, (value.float() for value in content["ema"]["shadow_params"]), strict=True))
        return tuple({rename(name): value for name, value in values.items() if not name.startswith(TRAINING)}
                     for values in (trained, average))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of the paper's authors ({type(error).__name__}: {first_line(error)})"
                        ) from None


def rename(name: str) -> str:
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def settings_of(trained: dict[str, Tensor], args: argparse.Namespace, path: Path) -> dict:
    """The settings of the network with these weights. Raises UserError for shapes that none has."""
    try:
        V, D = trained["embedding"].shape
        cond_width = trained["time_s.mlp.2.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a checkpoint of the paper's authors ({first_line(error)} is missing)") from None
    if V < 2 or D < HEAD or D % HEAD:
        raise UserError(f"{path}: V = {V}, D = {D}: D must be a multiple of {HEAD}, the width of a head, and V 2 or more")
    blocks = {name.split(".")[1] for name in trained if name.startswith("blocks.")}
    preset = flm.PRESETS[args.dataset] if args.dataset else dict(seq_len=args.seq_len)
    return preset | dict(
        dataset=args.dataset, data_dir=args.data_dir, depth=len(blocks), width=D, heads=D // HEAD, cond_width=cond_width,
        logit_cap=args.logit_cap, attention_cap=50.0, bf16=True, run_dir=args.run_dir)


def convert(path: Path, args: argparse.Namespace) -> str:
    """Writes K.pt, its settings and tokenizer.json into the run folder and returns K: fmlm for weights of two times, else
    flm. Raises UserError, and writes nothing, where the file or the folder does not fit."""
    content, folder = read(path), Path(args.run_dir)
    trained, average = weights(content, path)
    settings = settings_of(trained, args, path)
    steps = content.get("global_step")
    settings["max_steps"] = steps if isinstance(steps, int) and steps > 0 else 1
    kind = "fmlm" if "time_t.mlp.0.weight" in trained else "flm"
    config = (distill.Config if kind == "fmlm" else flm.Config)(**settings)
    network = flm.Config(**{f.name: getattr(config, f.name) for f in fields(flm.Config)})
    V = len(trained["embedding"])
    tokenizer = data.make_tokenizer(config.tokenizer, None, V) if args.dataset else data.Tokenizer(
        {"kind": "ids", "vocab_size": V})
    if tokenizer.vocab_size != V:
        raise UserError(f"{path}: has {V} tokens, the tokenizer of {args.dataset} {tokenizer.vocab_size}; give the other "
                        "--dataset, or --seq-len alone")
    there = folder / "tokenizer.json"
    if os.path.exists(folder / f"{kind}.pt") and not args.overwrite:
        raise UserError(f"{folder}: holds a {kind}.pt; give --overwrite, or another --run-dir")
    if os.path.exists(there) and data.Tokenizer.load(there).checksum != tokenizer.checksum:
        raise UserError(f"{folder}: holds a run with another vocabulary; give another --run-dir")
    try:
        model = flm.build(network, tokenizer, torch.full((V,), 1 / V).log(), kind)
        second = {name: value for name, value in model.state_dict().items() if name.startswith("time_t.")}  # no flow's
        model.load_state_dict(second | average)
        ema = [p.detach().clone() for p in model.parameters()]
        model.load_state_dict(second | trained)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:])[:200]  # the first names our class
        raise UserError(f"{path}: not the network of the paper's authors ({reason or first_line(error)})") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        tokenizer.save(there)
        write_checkpoint(folder / f"{kind}.pt", dict(
            kind=kind, config=lasting(network) | {"data_dir": ""}, source="", tokenizer=tokenizer.checksum,
            log_p=model.log_p, step=config.max_steps, model=model.state_dict(), ema=ema, optimizers=[]))
        old = ("flm", "fmlm", "correction") if kind == "flm" else ("fmlm", "correction")  # as flm.py and distill.py do
        clear(folder, *old, but=folder / f"{kind}.pt")
        write_settings(config, kind)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --run-dir") from None
    return kind


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt, or the .safetensors of the same network")
    parser.add_argument("--run-dir", required=True, help="folder to make a run of")
    parser.add_argument("--dataset", default="", choices=("lm1b", "owt"), help="its text: gives length and tokenizer")
    parser.add_argument("--data-dir", default="", help="where that text is, if it is not to be downloaded (as for flm.py)")
    parser.add_argument("--seq-len", type=int, default=0, help="its length, without --dataset: samples are token ids then")
    parser.add_argument("--logit-cap", default="30", choices=("none", "30"),
                        help="none: the paper's first version, which had no cap on its output (default 30)")
    parser.add_argument("--overwrite", action="store_true", help="replace the flm.pt, or fmlm.pt, of the folder")
    args = parser.parse_args(argv)
    if bool(args.dataset) == (args.seq_len > 0):
        raise UserError("give --dataset lm1b, --dataset owt, or --seq-len with 1 or more positions")
    args.logit_cap = 0.0 if args.logit_cap == "none" else float(args.logit_cap)
    return args


@unlocks()
def main(argv: list[str]) -> None:
    args = parse(argv)
    kind = convert(Path(args.checkpoint), args)
    print(f"{Path(args.run_dir, kind)}.pt and {config_file(Path(args.run_dir), kind).name} written; "
          f"{program(kind).split(' --')[0]} --sample --run-dir {args.run_dir}")


if __name__ == "__main__":
    sys.exit(guard(main))
