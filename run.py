"""What a run needs around the mathematics: flags, processes, checkpoints, the run folder and its log.

Nothing here knows of flows; flm.py, distill.py and whatever else trains or samples share it.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, asdict, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sources import UserError, replace_file

# Flags that may differ from those a run was begun with, and are not kept with it: they decide no weight (but for rounding,
# which follows device and threads).
FREE = {"run_dir", "data_url", "device", "threads", "shard", "resume", "overwrite", "stop_after", "sample", "sample_steps",
        "num_samples", "churn", "guidance", "renoise", "prompt", "infill", "mask_char", "out", "html",
        "skip_bad_steps"}


# -------------------------------------------------------------------------------------------------------------- flags


def setting(default, help: str, least: float | None = None, most: float = 10**12, choices: tuple | None = None):
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
        fits = isinstance(value, f.type | int if f.type is float else f.type)
        fits = fits and (not isinstance(value, bool) or f.type in (bool, bool | None))  # to Python True is a number
        if not fits or choices and value not in choices:
            must = " or ".join(choices) if choices else getattr(f.type, "__name__", "true or false")
            raise UserError(f"{flag(f.name)} {str(value)[:40]}: must be {must}")
        if f.name in ("prompt", "infill", "html") and value and not settings["sample"]:
            raise UserError(f"{flag(f.name)} {value}: is for --sample")
        if least is not None and not least <= value <= most:
            raise UserError(f"{flag(f.name)} {str(value)[:40]}: must be {least} or more, {most} or less")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------- processes


def number(name: str, default: int = 0) -> int:
    """What torchrun tells a process."""
    text = os.environ.get(name, str(default))
    return int(text) if text.isdecimal() else default


def rank() -> int:
    return number("RANK")


def local_rank() -> int:
    return number("LOCAL_RANK")


def world() -> int:
    return number("WORLD_SIZE", 1)


def machine() -> int:
    return number("GROUP_RANK")


processes: list[list[int]] = []  # of each rank, its machine and the number of its process there


def setup(kind: str, threads: int) -> torch.device:
    """Sets the number of threads, chooses the device and, under torchrun, joins the process group."""
    keep_memory()
    torch.set_flush_denormal(True)  # a sure network's gradients leave float32's normal range, where a CPU is far slower
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
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                    device_id=device if kind == "cuda" else None,
                                    timeout=timedelta(days=1))  # one may tokenise for hours while the others wait
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is {world()}, but {first_line(error)}; start it by torchrun, or unset WORLD_SIZE"
                            ) from None
        places = torch.zeros(world(), 2, dtype=torch.long)
        places[rank()] = torch.tensor([machine(), os.getpid()])
        processes[:] = total(places).tolist()
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


# ------------------------------------------------------------------------------------------------------------ signals

PATIENCE = 8.0  # seconds that a process has to end by itself when it was told to


class Stop:
    """Hears Ctrl-C, SIGTERM and SIGHUP. The first one raises KeyboardInterrupt or, in the steps of a training loop, waits
    for it to ask. A second one, or PATIENCE seconds, end the process wherever it is, unless it is saving."""

    def __init__(self):
        self.signal, self.waits, self.saving, self.question = 0, False, False, None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        signals = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
        self.__init__()
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        other = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self.hear) for number in signals}
        watch = threading.Thread(target=self.watch, args=(ear,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            for number in signals:
                signal.signal(number, before[number])
            signal.set_wakeup_fd(other)
            mouth.close()
            watch.join()
            ear.close()

    def hear(self, number: int, frame) -> None:
        if not self.signal:
            self.signal = number
            if not self.waits:
                raise KeyboardInterrupt

    def watch(self, ear: socket.socket) -> None:
        """The thread that hears what the main one cannot, in the middle of a long computation."""
        if not (first := ear.recv(1)):  # the end of listening
            return
        end, more = time.monotonic() + PATIENCE, None
        ear.settimeout(0.1)
        while more is None and (self.saving or time.monotonic() < end):
            with contextlib.suppress(TimeoutError):
                more = ear.recv(1)
        if more != b"":
            with contextlib.suppress(OSError):
                os.write(2, b"\nended at once; what was saved is whole, the same command or --resume goes on\n")
            os._exit(128 + first[0])

    def hold(self, steps: Iterable[int]) -> Iterator[int]:
        """Goes through steps that a signal does not break into."""
        self.question = None
        for step in steps:
            self.waits = True
            yield step
        self.let()

    def let(self) -> None:
        """From here on, until the next step, a signal may break in."""
        self.waits = False
        if self.signal:
            raise KeyboardInterrupt

    def asked(self) -> bool:
        """Whether a signal has come to any process. Of several, all hear of it in the same step, which is one later, as
        then none has to wait for the answer."""
        if world() == 1:
            return self.signal > 0
        number, answer = torch.tensor(self.signal), self.question
        self.question = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        if answer is None:
            return False
        answer[1].wait()
        self.signal = max(self.signal, int(answer[0]))
        return int(answer[0]) > 0


stop = Stop()


class Unheard:
    """Standard error that drops what nobody is there to read: a closed terminal ends no training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Standard output that takes any character, and standard error that takes anything; a closed one becomes the null
    device, or the next file to be opened would have its number and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(Unheard(sys.stderr)):
        yield


def guard(main: Callable[[list[str]], None], resumes: bool = False) -> int:
    """Runs a command line, one that resumes or not, and returns its exit status; what the user can mend is one line and
    status 2."""
    with streams(), stop.listening():
        try:
            status = 0
            main(sys.argv[1:])
            if dist.is_initialized():
                dist.barrier()  # who leaves first takes the connections of the others with it
            stop.waits = True  # nothing is left to stop
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            stop.waits = True  # no second one while the first is dealt with
            status, line = fault(error, resumes)
            if line:
                from tqdm import tqdm

                tqdm.write(line, file=sys.stderr)  # above a progress bar
        if dist.is_initialized():  # threads of gloo may outlive the interpreter's end, and abort it
            sys.stderr.flush()
            os._exit(status)
    return status


def fault(error: BaseException, resumes: bool) -> tuple[int, str]:
    """The exit status and the line that tell what went wrong. Raises what is nobody's fault but the program's."""
    name, text, resumes = Path(sys.argv[0]).name, str(error), resumes and "--sample" not in sys.argv
    if isinstance(error, UserError):
        return 2, f"{name}: {error}" * (local_rank() == 0)  # a fault may be one machine's own, so each says it once
    if isinstance(error, BrokenPipeError):  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13, ""
    if isinstance(error, (KeyboardInterrupt, RuntimeError)) and (gone := lost(error)):
        hint = "; --resume goes on from the last checkpoint" * resumes
        return 1, f"{name}: {gone} has ended, and so does rank {rank()}{hint}"
    if isinstance(error, KeyboardInterrupt):
        hint = "interrupted" + "; --resume goes on from the last checkpoint, the same command if there is none" * resumes
        return 128 + (stop.signal or signal.SIGINT), (text or hint) * (rank() == 0)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (
            isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text):
        return 2, f"{name}: out of memory ({first_line(error)}); make batch, network or vocabulary smaller; see README.md"
    if isinstance(error, OSError) and error.strerror:
        return 2, f"{name}: {error.filename or 'standard output'}: {error.strerror}; make room there, or name another place"
    raise error


def lost(error: BaseException) -> str:
    """Which process has left this one without an answer: its rank, if it was on this machine; "" if none has."""
    def gone(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False
    ranks = [i for i, (place, pid) in enumerate(processes) if place == machine()]
    broken = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
    end = time.monotonic() + 5 * broken  # torchrun takes a while to bury it
    while len(processes) > 1:
        if dead := [str(i) for i in ranks if gone(processes[i][1])]:
            return f"rank {', '.join(dead)}"
        if time.monotonic() >= end:
            return "a process on another machine" * (broken and len(ranks) < len(processes))
        time.sleep(0.1)
    return ""


# -------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(path: Path, content: dict) -> None:
    """Replaces K.pt whole or not at all, whenever it is cut off; what K.pt held before stays as K.prev.pt.

    Raises UserError where it cannot be written.
    """
    part, spare = path.with_suffix(".part"), path.with_suffix(".prev.pt")
    stop.saving = True
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
        with contextlib.suppress(OSError):  # it may be what fills the disk
            part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({first_line(error)}); what it held before is whole; make room for "
                        "it, or mend its folder's permissions") from None
    finally:
        stop.saving = False


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint: plain values and tensors, no pickled code, its checksums verified first.

    Raises UserError for a missing, damaged or foreign file.
    """
    spare = path.with_suffix(".prev.pt")
    if not path.is_file():
        if spare.is_file() or path.exists():
            raise UserError(f"{path}: no such file; {spare} is the one before it, if it is there: rename that")
        if config_file(path.parent, path.stem).exists():
            raise UserError(f"{path}: this run has saved no checkpoint yet; give the command that began it once more, or "
                            "--resume")
        raise UserError(f"{path}: no such checkpoint; train one first: {program(path.stem)} --run-dir {path.parent}")
    try:
        verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_content(content)
        return content
    except Exception as error:  # zipfile, torch and pickle each raise their own
        mend = f"{spare} is the one before it: rename that" if spare.exists() else (
            f"train again: {program(path.stem)} --run-dir {path.parent} --overwrite")
        raise UserError(f"{path}: not a whole checkpoint ({first_line(error)}); {mend}") from None


def verify(path: Path) -> None:
    """Checks the checksums of a file that torch.save wrote. Raises one of many errors where it is damaged, or larger in
    memory than on disk."""
    with zipfile.ZipFile(path) as records:
        if sum(record.file_size for record in records.infolist()) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
        if (bad := records.testzip()) is not None:
            raise ValueError(f"{bad} is damaged")


MISFITS = AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError  # of a strange content
PARTS = dict(kind=str, config=dict, tokenizer=str, log_p=Tensor, model=dict, ema=list, step=int, source=str | None)


def check_content(content: dict) -> None:
    """Raises ValueError unless a checkpoint has its parts, and tensors that are as large as they say."""
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in PARTS.items()):
        raise ValueError("not written by this program")
    for x in (content["log_p"], *content["model"].values(), *content["ema"]):
        if not isinstance(x, Tensor) or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError("a part of it is not the tensor that it should be")


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


def clear(folder: Path, *kinds: str, but: Path | None = None) -> None:
    """Removes what runs have left; their settings first, without which nothing goes on by itself."""
    for kind in kinds:
        for path in reversed(files(folder, kind)):
            if path != but:
                path.unlink(missing_ok=True)


def write_settings(config, kind: str) -> None:
    """The last file of a run that begins: with it, --resume goes on."""
    replace_file(config_file(Path(config.run_dir), kind), json.dumps(lasting(config), indent=1))


def read_settings(folder: Path, kind: str, Config: type) -> dict:
    """The settings that the K = `kind` of this folder was begun with. Raises UserError where there are none."""
    path = config_file(folder, kind)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        stored = json.loads(path.read_text())
        defaults = lasting(Config())  # what an older program did not know it did not do
        if not isinstance(stored, dict) or "dataset" not in stored or stored.keys() - defaults.keys():
            raise ValueError("its settings are not this program's")
        validate(asdict(Config()) | stored, Config)
        return defaults | stored
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, so no run to go on with; put it back, or train anew: {program(kind)} "
                        f"--run-dir {folder} --overwrite") from None
    except (OSError, ValueError, UserError, RecursionError) as error:
        raise UserError(f"{path}: not the settings of a run ({first_line(error)}); --overwrite trains anew") from None


def is_run(folder: Path, kind: str, Config: type) -> bool:
    """Whether a run has settings, our own: one without a checkpoint yet may start anew."""
    try:
        return bool(read_settings(folder, kind, Config))
    except UserError:
        return False


def open_folder(settings: dict, given: set[str], kind: str, Config: type) -> dict:
    """Makes the run folder ready for a K = `kind` and returns the settings: those it was begun with if resuming.

    Raises UserError if the folder cannot be written, is another process's, holds a run that is not to be overwritten, or was
    begun otherwise.
    """
    folder = Path(settings["run_dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        lock(folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); give another --run-dir") from None
    if settings["resume"] and settings["overwrite"]:
        raise UserError("--resume and --overwrite exclude each other; give one")
    if not settings["resume"]:
        checkpoint, spare, *_ = files(folder, kind)
        foreign = [] if is_run(folder, kind, Config) else [config_file(folder, kind)]
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


locks: dict[Path, object] = {}  # of the folders in which this process trains


@contextlib.contextmanager
def unlocks() -> Iterator[None]:
    """Around a command: the folders that it locks are free behind it."""
    try:
        yield
    finally:
        while locks:
            locks.popitem()[1].release()


def lock(folder: Path) -> None:
    """Keeps a folder for the first process of a run until it ends, in whatever way. Raises UserError if it is taken."""
    if rank() == 0:
        from filelock import FileLock, Timeout

        try:
            locks.setdefault(folder.resolve(), FileLock(folder / ".lock")).acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another process is training there; wait for it, end it, or give another --run-dir"
                            ) from None


def picture(path: Path, draw: Callable[[Path], None]) -> None:
    """Draws it into a file, or says why not: no picture is worth a run."""
    try:
        from matplotlib import rc_context

        with rc_context({"text.parse_math": False}):  # a name may hold a $
            draw(path)
    except Exception as error:  # matplotlib's are many
        say(f"{path}: could not be drawn ({first_line(error)})")


def lasting(config) -> dict:
    """The settings that decide the weights: what config.json and checkpoints keep."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


class Log:
    """K.log.jsonl, one JSON object a line, and the texts among them as K.samples.txt.

    Resuming from `step` drops what came after it. Only the first process reads or writes; where the disk is full it says so,
    and the next line brings those that are missing.
    """

    def __init__(self, folder: Path, kind: str, step: int):
        self.path, self.samples, self.lines = folder / f"{kind}.log.jsonl", folder / f"{kind}.samples.txt", []
        if rank() == 0:
            with contextlib.suppress(OSError):
                for line in self.path.read_bytes().splitlines() if step else ():
                    try:
                        line = json.loads(line)
                        if line["step"] <= step and all(isinstance(text, str) for text in line.get("samples", [])):
                            self.lines.append(line)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # cut off in the middle
                        break
            self.written = 0
            self.save()

    def write(self, **line) -> None:
        if rank() == 0:
            self.lines.append(line)
            self.save()

    def save(self) -> None:
        new, append = self.lines[self.written :], self.written > 0
        shown = [f"step {line['step']}\n" + "".join(f"    {text}\n" for text in line["samples"]) for line in new
                 if "samples" in line]
        try:
            self.written = 0  # until all is
            for path, text in (self.path, "".join(json.dumps(line) + "\n" for line in new)), (self.samples, "".join(shown)):
                if append:
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(text)
                else:
                    replace_file(path, text)
            self.written = len(self.lines)
        except OSError as error:
            say(f"{error.filename or self.path}: cannot be written ({error.strerror}); tries again at the next line")

    def evaluated(self) -> set[int]:
        return {line["step"] for line in self.lines if "heldout" in line}

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
