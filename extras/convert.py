"""Imports a released FLM or FMLM checkpoint of the paper's authors into a run folder.

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
import zipfile
from pathlib import Path

import torch

import data
import flm
from data import UserError

HEAD = 64  # width of an attention head of the released networks
UNKNOWN = "unknown (converted without --dataset)"
CAPS = {"30": 30.0, "none": 0.0}
NAMES = {  # replaced in this order
    "backbone.": "", "_orig_mod.": "", "vocab_embed.": "",
    "sigma_map_prime.": "time_t.", "sigma_map.": "time_s.", "attn_qkv": "qkv", "attn_out": "out",
    "adaLN_modulation": "modulation", "output_layer.norm_final": "norm",
    "output_layer.linear": "head", "output_layer.": ""}

class Empty:
    """Replaces a class or function of unknown code: accepts all arguments and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

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
    endings = dict(dict=EmptyDict, list=EmptyList)
    return endings.get(name.lower()[-4:], Empty)

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
    except (UserError, OSError):
        raise
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install safetensors") from None
    except Exception as error:  # zipfile, torch and pickle raise many kinds
        reason = str(error).rpartition("WeightsUnpickler error:")[2]  # without torch's advice
        reason = " ".join([type(error).__name__ + ":", *reason.split()])[:250]
        raise UserError(f"{path}: not a released FLM or FMLM checkpoint ({reason}); "
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

def convert(path, args):
    """Writes K.pt, the config of K and tokenizer.json; returns K, flm or fmlm. Raises UserError."""
    with released(path):
        content = read(path)
        step = int(content.get("global_step", 0))
        trained, average = convert_weights(content)
        kind = "fmlm" if "time_t.mlp.0.weight" in trained else "flm"
        settings = network_settings(trained)
    V, folder = len(trained["embedding"]), Path(args.run_dir)

    # settings and tokenizer
    text = flm.PRESETS[args.dataset] if args.dataset else dict(seq_len=args.seq_len)
    config = flm.Config(**text, **settings, dataset=args.dataset or UNKNOWN,
                        data_dir=args.data_dir, logit_cap=CAPS[args.logit_cap],
                        run_dir=args.run_dir, overwrite=args.overwrite)
    flm.check(config)
    tokenizer = data.Tokenizer(dict(kind="ids", vocab_size=V))
    if args.dataset:
        tokenizer = data.make_tokenizer(config.tokenizer, None, V)
    if tokenizer.vocab_size != V:
        raise UserError(f"{path}: has V = {V}, but --dataset {args.dataset} has V = "
                        f"{tokenizer.vocab_size}; use the other --dataset, or --seq-len")

    # the weights must fit the network
    with released(path):
        model = flm.build(config, tokenizer, torch.device("cpu"), False, flm.NETWORKS[kind])
        for weights in (trained, average):
            model.load_state_dict(weights)

    # the run folder may contain another model with the same vocabulary
    if Path(folder, f"{kind}.pt").exists() and not args.overwrite:
        raise UserError(f"{folder}: contains {kind}.pt; use --overwrite or another --run-dir")
    saved = folder / "tokenizer.json"
    if saved.exists() and data.Tokenizer.load(saved).checksum != tokenizer.checksum:
        raise UserError(f"{folder}: contains another vocabulary; use another --run-dir")
    flm.begin_run(flm.open_run(config, {}, kind), kind)
    tokenizer.save(saved)
    flm.save_checkpoint(folder / f"{kind}.pt", dict(
        kind=kind, step=step, config=config.saved(), log=[], source="",
        tokenizer=tokenizer.checksum, model=trained, average=average, optimizers=[]))
    return kind

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
    args = parser.parse_args(argv)
    kind = convert(Path(args.file), args)
    print(f"wrote {Path(args.run_dir, kind)}.pt")

if __name__ == "__main__":
    flm.run_command(main)
