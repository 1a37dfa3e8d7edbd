"""What a run needs around the mathematics: flags, processes, checkpoints, the run folder and its log.

Nothing here knows of flows; flm.py, distill.py and whatever else trains or samples share it.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import Field, asdict, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sources import UserError

# Flags that may differ from those a run was begun with, and are not kept with it: they decide no weight (but for rounding,
# which follows device and threads).
FREE = {"run_dir", "data_url", "device", "threads", "shard", "resume", "overwrite", "stop_after", "sample", "sample_steps",
        "num_samples", "churn", "guidance", "renoise", "prompt", "infill", "mask_char", "out"}


# -------------------------------------------------------------------------------------------------------------- flags


def setting(default, help: str, least: float | None = None, most: float = math.inf, choices: tuple | None = None):
    """A dataclass field that is also a flag: its default, help text and bounds."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


def parse(argv: list[str], Config: type, doc: str, defaults: Callable[[Field], str | None]) -> dict:
    """The flags of a command line that were given, by the names of Config's fields.

    Each field is a --flag; defaults(field) is what the help says of its default, None where it is to be no flag.
    Raises UserError for an unknown flag.
    """
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(Config):
        if (default := defaults(f)) is None:
            continue
        kind = dict(action=argparse.BooleanOptionalAction) if f.type in (bool, bool | None) else dict(
            type=f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else f.type.__name__.upper())
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **kind, help=(
            f.metadata["help"] + f" (default {default})" * bool(default)).replace("%", "%%"))
    return vars(parser.parse_args(argv))


def validate(settings: dict, Config: type) -> None:
    """Raises UserError for a setting of the wrong type or out of its bounds."""
    for f in fields(Config):
        value, least, most, choices = settings[f.name], f.metadata["least"], f.metadata["most"], f.metadata["choices"]
        if not isinstance(value, f.type | int if f.type is float else f.type) or choices and value not in choices:
            raise UserError(f"{flag(f.name)} {value}: must be {' or '.join(choices) if choices else f.type.__name__}")
        if f.name in ("prompt", "infill") and value and not settings["sample"]:
            raise UserError(f"{flag(f.name)} {value}: is for --sample")
        if least is not None and not (least <= value <= most and math.isfinite(value)):
            raise UserError(f"{flag(f.name)} {value}: must be {least} or more" + f", {most} or less" * (most < math.inf))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------- processes


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def setup(kind: str, threads: int) -> torch.device:
    """Sets the number of threads, chooses the device and, under torchrun, joins the process group."""
    keep_memory()
    if threads:
        torch.set_num_threads(threads)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise UserError(f"--device {kind}: this machine has none; use --device cpu")
    device = torch.device(kind, local_rank()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None,
                                timeout=timedelta(days=1))  # one process may tokenise for hours while the others wait
    return device


def keep_memory() -> None:
    """Asks glibc to keep freed memory. It hands large blocks back to the system, and then each V-wide tensor is paid for in
    page faults: half of a CPU step at V = 50257."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def first_does(work: Callable, device: torch.device):
    """work() on the first process of each machine, then on the others; a UserError of one ends all of them."""
    failure, result = None, None
    if local_rank() == 0:
        try:
            result = work()
        except UserError as error:
            failure = error
    if total(torch.tensor(float(failure is not None), device=device)):
        raise failure or UserError("another process could not go on")
    return result if local_rank() == 0 else work()


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def say(text: str) -> None:
    """Prints on stderr from one process, above the progress bar."""
    if rank() == 0:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def guard(main: Callable[[list[str]], None], resumes: bool = False) -> int:
    """Runs a command line, one that resumes or not, and returns its exit status; what the user can mend is one line and
    status 2."""
    try:
        main(sys.argv[1:])
        if dist.is_initialized():
            dist.barrier()  # who leaves first takes the connections of the others with it
    except UserError as error:
        if local_rank() == 0:  # a fault may be one machine's own, so each says it once
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted" + "; --resume goes on from the last checkpoint, the same command if there is none" * resumes)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


# -------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(path: Path, content: dict) -> None:
    """Replaces K.pt whole or not at all, whenever it is cut off; what K.pt held before stays as K.prev.pt."""
    part, spare = path.with_suffix(".part"), path.with_suffix(".prev.pt")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            spare.unlink(missing_ok=True)
            try:
                os.link(path, spare)
            except OSError:  # a file system without links
                shutil.copyfile(path, spare)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); what it held before is whole") from None


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint: plain values and tensors, no pickled code, its checksums verified first.

    Raises UserError for a missing, damaged or foreign file.
    """
    if not path.is_file():
        if config_file(path.parent, path.stem).exists():
            raise UserError(f"{path}: this run has saved no checkpoint yet; give the command that began it once more")
        raise UserError(f"{path}: no such checkpoint; train one first: {program(path.stem)} --run-dir {path.parent}")
    try:
        verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"kind", "config", "tokenizer", "log_p", "model", "ema"} <= content.keys():
            raise ValueError("not written by this program")
        return content
    except Exception as error:  # zipfile, torch and pickle each raise their own
        spare = path.with_suffix(".prev.pt")
        mend = f"{spare} is the one before it: rename that" if spare.exists() else "train again with --overwrite"
        raise UserError(f"{path}: not a whole checkpoint ({first_line(error)}); {mend}") from None


def verify(path: Path) -> None:
    """Checks the checksums of a file that torch.save wrote; raises one of many errors where it is damaged."""
    with zipfile.ZipFile(path) as records:
        if (bad := records.testzip()) is not None:
            raise ValueError(f"{bad} is damaged")


def program(kind: str) -> str:
    """The command that trains a K = `kind`."""
    return {"flm": "python flm.py", "ar": "python baselines.py --model ar", "mdlm": "python baselines.py --model mdlm"
            }.get(kind, "python distill.py")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --------------------------------------------------------------------------------------------------------- run folder


def config_file(folder: Path, kind: str) -> Path:
    return folder / ("config.json" if kind == "flm" else f"{kind}.config.json")


def files(folder: Path, kind: str) -> list[Path]:
    """What a run leaves for its K = `kind`, whether it is there or not."""
    ends = (".pt", ".prev.pt", ".log.jsonl", ".part", ".samples.txt", ".loss.png")
    return [*(folder / f"{kind}{end}" for end in ends), config_file(folder, kind)]


def clear(folder: Path, *kinds: str) -> None:
    for kind in kinds:
        for path in files(folder, kind):
            path.unlink(missing_ok=True)


def write_settings(config, kind: str) -> None:
    config_file(Path(config.run_dir), kind).write_text(json.dumps(lasting(config), indent=1))


def read_settings(folder: Path, kind: str, Config: type) -> dict:
    """The settings that the K = `kind` of this folder was begun with. Raises UserError where there are none."""
    path = config_file(folder, kind)
    try:
        stored = json.loads(path.read_text())
        defaults = lasting(Config())  # what an older program did not know it did not do
        if not isinstance(stored, dict) or "dataset" not in stored or stored.keys() - defaults.keys():
            raise ValueError("its settings are not this program's")
        validate(asdict(Config()) | stored, Config)
        return defaults | stored
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so no run to go on with; put it back, or train anew: {program(kind)} "
                        f"--run-dir {folder} --overwrite") from None
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path}: not the settings of a run ({first_line(error)}); --overwrite trains anew") from None


def open_folder(settings: dict, given: set[str], kind: str, Config: type) -> dict:
    """Makes the run folder ready for a K = `kind` and returns the settings: those it was begun with if resuming.

    Raises UserError if the folder cannot be written, holds a run that is not to be overwritten, or was begun otherwise.
    """
    folder = Path(settings["run_dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --run-dir") from None
    if settings["resume"] and settings["overwrite"]:
        raise UserError("--resume and --overwrite exclude each other; give one")
    if not settings["resume"]:
        checkpoint, spare, log, *_ = files(folder, kind)
        foreign = [] if log.exists() else [config_file(folder, kind)]  # a run without a checkpoint yet may start anew
        taken = [path.name for path in [checkpoint, spare, *foreign] if path.exists()]
        if taken and not settings["overwrite"]:
            raise UserError(f"{folder}: holds a run ({taken[0]}); --resume goes on with it, --overwrite replaces it, "
                            "--run-dir names another")
        return settings
    stored = read_settings(folder, kind, Config)
    for name in given - FREE:
        if stored[name] != settings[name]:
            begun = "without it" if stored[name] in ("", None) else f"with {stored[name]}"
            raise UserError(f"{flag(name)} {settings[name]}: this run was begun {begun}; leave the flag out, or start "
                            "another --run-dir")
    return settings | stored


def lasting(config) -> dict:
    """The settings that decide the weights: what config.json and checkpoints keep."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


class Log:
    """K.log.jsonl, one JSON object a line, and the texts among them as K.samples.txt.

    Resuming from `step` drops what came after it. Only the first process reads or writes.
    """

    def __init__(self, folder: Path, kind: str, step: int):
        self.path, self.samples, self.lines = folder / f"{kind}.log.jsonl", folder / f"{kind}.samples.txt", []
        if rank() == 0:
            old = self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []
            for path in (self.path, self.samples):
                path.write_text("")
            for line in old:
                try:
                    line = json.loads(line)
                except ValueError:  # cut off in the middle
                    break
                if line["step"] <= step:
                    self.write(**line)

    def write(self, **line) -> None:
        if rank() == 0:
            self.lines.append(line)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if "samples" in line:
                with open(self.samples, "a", encoding="utf-8") as file:
                    file.write(f"step {line['step']}\n" + "".join(f"    {text}\n" for text in line["samples"]))

    def plot(self, path: Path) -> None:
        """Loss over steps, and the last held-out loss by tenth of tau."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in ("loss", "heldout"):
            left.plot(*zip(*((line["step"], line[name]) for line in self.lines if name in line)), label=name)
        left.set(xlabel="step", ylabel="loss a position")
        left.legend()
        for last in [line["heldout_by_tau"] for line in self.lines if "heldout" in line][-1:]:  # none if it was cut off
            right.bar([k / 10 + 0.05 for k in range(10)], last, width=0.09)
        right.set(xlabel="tau", ylabel="held-out loss a position")
        figure.savefig(path)
