"""Converts a released FLM or FMLM checkpoint of the paper's authors to a checkpoint of flm.py.

    python -m extras.convert lm1b_flm.ckpt --dataset lm1b --run-dir runs/released    # flm.pt
    python -m extras.convert lm1b_fmlm.ckpt --dataset lm1b --run-dir runs/released   # fmlm.pt
    python flm.py --sample --run-dir runs/released
    python distill.py --sample --run-dir runs/released

A released file is a Lightning checkpoint. `state_dict` contains the trained weights, and
`ema.shadow_params` lists their averages in the same order. A .safetensors file with the names of
`state_dict` works too. The shapes determine the sizes. A network with two times is a flow map.
Nothing in the file is executed: all objects but tensors and plain values become empty objects.
"""

import contextlib
import sys
import zipfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # for python extras/NAME.py
import data
import flm
from data import UserError

HEAD = 64  # width of an attention head of the released networks
CAPS = {"30": 30.0, "none": 0.0}
NAMES = {  # replaced in this order
    "backbone.": "", "_orig_mod.": "", "vocab_embed.": "",
    "sigma_map_prime.": "time_t.", "sigma_map.": "time_s.", "attn_qkv": "qkv", "attn_out": "out",
    "adaLN_modulation": "modulation", "output_layer.norm_final": "norm",
    "output_layer.linear": "head", "output_layer.": ""}

class Empty:
    """Replaces a class or function of unknown code: it accepts all arguments."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

class EmptyDict(Empty):
    def __new__(cls, *args):
        return {}  # torch.load fills it

class EmptyList(Empty):
    def __new__(cls, *args):
        return []

def replacement(name):
    """The class that replaces the class or function `name`."""
    return dict(dict=EmptyDict, list=EmptyList).get(name.lower()[-4:], Empty)

def read(path):
    """The tensors and plain values of a .ckpt or .safetensors file."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file
        return dict(state_dict=load_file(path))
    with zipfile.ZipFile(path) as records:
        if damaged := records.testzip():
            raise ValueError(f"{damaged} is damaged")
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(replacement(name), name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

@contextlib.contextmanager
def released(path):
    """Turns any error in the content of a released file into a UserError of one line."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install safetensors") from None
    except Exception as error:  # zipfile, torch and pickle raise many kinds
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # no advice of torch
        raise UserError(f"{path}: not a released FLM or FMLM checkpoint ({reason:.200}); "
                        "download it again") from None

def convert_weights(content):
    """The trained weights and their averages, two dicts with the names of flm.Transformer."""
    weights = content["state_dict"]
    network = [name for name in weights if name.startswith("backbone.")]  # the others: a teacher
    names = [name for name in network or weights if not name.endswith("rotary_emb.inv_freq")]
    trained = [weights[name] for name in names]
    averages = content["ema"]["shadow_params"] if "ema" in content else trained
    for i, name in enumerate(names):
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        names[i] = name
    return [{name: x.float().clone() for name, x in zip(names, values, strict=True)
             if not name.startswith("learnable_loss_weighting.")}  # only used in training
            for values in (trained, averages)]

def network_settings(weights):
    """The settings of flm.Config that follow from the shapes of the weights."""
    V, D = weights["embedding"].shape
    if V < 2 or D < HEAD or D % HEAD:
        raise ValueError(f"V = {V}, D = {D}: D must be a multiple of {HEAD}")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    cond_width = len(weights["time_s.mlp.2.weight"])
    return dict(depth=depth, width=D, heads=D // HEAD, cond_width=cond_width, attention_cap=50.0)

def find_tokenizer(args, kind, V):
    """The tokenizer of --dataset, or one that writes token ids. Raises UserError."""
    if not args.dataset:
        return data.Tokenizer(dict(kind="ids", vocab_size=V))
    tokenizer = data.make_tokenizer(kind, None, V)
    if tokenizer.vocab_size != V:
        raise UserError(f"{args.file}: has V = {V}, but --dataset {args.dataset} has V = "
                        f"{tokenizer.vocab_size}; use the other --dataset, or --seq-len")
    return tokenizer

def convert(args):
    """Writes flm.pt or fmlm.pt to the run folder; returns its path. Raises UserError."""
    source = Path(args.file)
    if not source.is_file():
        raise UserError(f"{source}: no such file; check the path")
    with released(source):
        content = read(source)
        step = int(content.get("global_step", 0))
        trained, average = convert_weights(content)
        settings = network_settings(trained)
    kind = "fmlm" if "time_t.mlp.0.weight" in trained else "flm"
    path = Path(args.run_dir, f"{kind}.pt")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: exists; use --overwrite or another --run-dir")

    text = flm.PRESETS[args.dataset] if args.dataset else dict(seq_len=args.seq_len)
    config = flm.Config(**text, **settings, dataset=args.dataset or "unknown",
                        data_dir=args.data_dir, logit_cap=CAPS[args.logit_cap])
    flm.check(config)
    tokenizer = find_tokenizer(args, config.tokenizer, len(trained["embedding"]))
    with released(source):  # the weights must fit the network
        model = flm.build(config, tokenizer, torch.device("cpu"), False, flm.NETWORKS[kind])
        for weights in (trained, average):
            model.load_state_dict(weights)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {args.run_dir}: {error.strerror}; use another one") from None
    flm.save_checkpoint(path, dict(
        kind=kind, step=step, log=[], config=config.saved(), source="",
        tokenizer=tokenizer.content, model=trained, average=average, optimizers=[]))
    return path

def main(argv):
    parser = flm.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("file", help="released .ckpt file, or .safetensors file of its state_dict")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--dataset", default="", choices=("lm1b", "owt"), help="training text")
    text.add_argument("--seq-len", type=int, help="L without --dataset; texts are token ids")
    parser.add_argument("--data-dir", default="", help="local copy of the dataset")
    parser.add_argument("--run-dir", required=True, help="folder to write")
    parser.add_argument("--logit-cap", default="30", choices=CAPS, help="none for paper version 1")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the folder")
    print(f"wrote {convert(parser.parse_args(argv))}")

if __name__ == "__main__":
    flm.run(main)
