"""Where text comes from: a text file, lm1b's tarball, OpenWebText's parquet files; each as documents in a fixed order.

Nothing is unpacked to disk, and no more than a batch of about a MiB is held at a time, however large the corpus.
"""

import functools
import gzip
import hashlib
import http.client
import lzma
import os
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

EMBEDDED = {name: Path(__file__).parent / "corpora" / f"{name}.txt.xz" for name in ("words", "sotu")}
DATASETS = (*EMBEDDED, "lm1b", "owt")
LM1B = dict(url="http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
            size=1_792_209_805, sha256="01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e")
OWT = "Skylion007/openwebtext"  # its repository on the Hugging Face hub
BLOCK, LONGEST = 2**20, 2**24  # bytes: of a batch of lines, and the most that one line may have
BOMB = 2**28, 200  # what unpacks to more bytes than the first, and more than the second times its own, is no text
RETRIES, WAIT = 8, 1.0  # attempts in a row that bring nothing, seconds before the second one (they double)


class UserError(Exception):
    """A mistake that the user can mend; its message is the one line to print (exit status 2)."""


class Batch(NamedTuple):
    """Some documents that follow each other in a corpus."""

    place: str  # the file they are in
    numbers: list[int]  # the line, or row, of each in it
    texts: list[str]  # none of them blank
    split: str | None  # "train" or "heldout" where the source has a split of its own
    position: int  # how far the source has been read, of Source.size


@dataclass
class Source:
    """A corpus before it is tokenised."""

    name: str
    checksum: Callable[[], str]  # tells it from all others; reads what it needs to
    rule: str  # which documents are held out, in words
    size: int  # bytes to read, for a progress bar; 0: not known yet
    batches: Callable[[], Iterator[Batch]]  # the same ones at each call; raises UserError for what cannot be read
    detokenise: bool = False


def find(dataset: str, data_dir: str = "", data_url: str = "", cache: str = "data") -> Source:
    """The source behind --dataset and --data-dir; reads and downloads nothing yet. Raises UserError where there is none."""
    given = Path(data_dir) if data_dir else None
    if given and dataset not in ("lm1b", "owt"):
        raise UserError(f"--data-dir {data_dir}: is for lm1b and owt; give the text itself as --dataset")
    if data_url and (dataset != "lm1b" or given):
        raise UserError(f"--data-url {data_url}: is where lm1b is downloaded from; it goes with no other --dataset, nor "
                        "with --data-dir")
    if data_url and not re.match(r"https?://[^\s/]+/\S+$", data_url):
        raise UserError(f"--data-url {data_url}: must be an address that begins with http:// or https://")
    if given and not os.path.exists(given):
        raise UserError(f"--data-dir {data_dir}: no such file or folder")
    with readable(given or Path(dataset)):
        if dataset == "lm1b":
            return lm1b(given, data_url or LM1B["url"], Path(cache))
        if dataset == "owt":
            return owt(given)
        path = EMBEDDED.get(dataset, Path(dataset))
        if not os.path.isfile(path):
            raise UserError(f"--dataset {dataset}: not a file; give {', '.join(DATASETS)} or a text file")
        return Source(path.name.split(".")[0], lambda: sha256(path), "one line in twenty, by its hash", path.stat().st_size,
                      lambda: text_file(path))


# -------------------------------------------------------------------------------------------------------- text files


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is read into a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:  # ValueError: tarfile's
        raise UserError(f"{path}: cannot be read ({error}); put a whole copy in its place") from None


def sha256(path: Path) -> str:
    with readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(folder: Path, files: list[Path]) -> str:
    """A checksum of many large files, whose bytes are not all read: of their names, sizes, first and last 64 KiB."""
    total = hashlib.sha256()
    for path in files:
        with readable(path), open(path, "rb") as file:
            size = path.stat().st_size
            total.update(f"{path.relative_to(folder).as_posix()}\n{size}\n".encode() + file.read(2**16))
            file.seek(max(0, size - 2**16))
            total.update(file.read())
    return total.hexdigest()


def lines(file: BinaryIO, place: str) -> Iterator[tuple[list[int], list[str]]]:
    """The numbers and texts of the lines of a UTF-8 file that are not blank, about a MiB at a time."""
    number, rest, last = 1, b"", False
    while not last:
        block = file.read(BLOCK)
        last, rest = not block, rest + block
        cut = len(rest) if last else rest.rfind(b"\n") + 1
        if not cut:
            if len(rest) > LONGEST:
                raise UserError(f"{place}:{number}: a line of more than {LONGEST >> 20} MiB; break it into documents")
            continue
        whole, rest = rest[:cut], rest[cut:]
        try:
            texts = whole.decode("utf-8-sig" if number == 1 else "utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}:{number + whole.count(10, 0, error.start)}: not UTF-8 ({error.reason}); convert the "
                            "file to UTF-8") from None
        kept = [(i, text.rstrip("\r")) for i, text in enumerate(texts, start=number) if text.strip()]
        yield [i for i, _ in kept], [text for _, text in kept]
        number += len(texts) - 1


def bounded(path: Path, size: int) -> int:
    """Raises UserError if `size` bytes are more than a text packed into `path` may have; returns them."""
    if size > max(BOMB[0], BOMB[1] * path.stat().st_size):
        raise UserError(f"{path}: unpacks to more than {BOMB[0] >> 20} MiB and {BOMB[1]} times its size, as no text does; "
                        "unpack it yourself if it is one")
    return size


class Bounded:
    """A packed file as it reads unpacked, in blocks, bounded."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.total = file, path, 0

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.total = bounded(self.path, self.total + len(block))
        return block


@contextmanager
def unpacked(path: Path, suffix: str = "") -> Iterator[tuple[BinaryIO, BinaryIO | Bounded]]:
    """A file as it is, whose position tells how far it was read, and as it reads unpacked."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(suffix or path.suffix)
    with open(path, "rb") as raw, opener(raw) if opener else nullcontext(raw) as file:
        yield raw, Bounded(file, path) if opener else file


def text_file(path: Path) -> Iterator[Batch]:
    """A .txt, .txt.gz or .txt.xz with one document a line."""
    with readable(path), unpacked(path) as (raw, file):
        for numbers, texts in lines(file, str(path)):
            yield Batch(str(path), numbers, texts, None, raw.tell())


# -------------------------------------------------------------------------------------------------------------- lm1b
# The One Billion Word benchmark (Chelba et al. 2014): news, one sentence a line, shuffled, and tokenised by spaces.

SHARDS = {"train": re.compile(r"(^|/)training-monolingual\.tokenized\.shuffled/news\.en-\d{5}-of-00100$"),
          "heldout": re.compile(r"(^|/)heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-\d{5}-of-00050$")}


def split_of(name: str) -> str | None:
    """The split that a file of the benchmark belongs to, if any."""
    return next((split for split, pattern in SHARDS.items() if pattern.search(name)), None)


def lm1b(given: Path | None, url: str, cache: Path) -> Source:
    """The published tarball, downloaded to cache/lm1b, or a tarball or folder of the same layout."""
    name, rule = LM1B["url"].split("/")[-1], "its own files"
    if given is None:
        return Source("lm1b", lambda: LM1B["sha256"], rule, LM1B["size"], lambda: tarball(
            download(url, cache / "lm1b" / name, LM1B["size"], LM1B["sha256"])), detokenise=True)
    path = given / name if (given / name).is_file() else given
    if path.is_file():
        return Source("lm1b", lambda: sha256(path), rule, path.stat().st_size, lambda: tarball(path), detokenise=True)
    files = sorted(path for path in given.rglob("news.en*") if path.is_file() and split_of(path.as_posix()))
    if {split_of(path.as_posix()) for path in files} != SHARDS.keys():
        raise UserError(f"--data-dir {given}: holds neither {name} nor both of training-monolingual.tokenized.shuffled/"
                        "news.en-000NN-of-00100 and heldout-monolingual.tokenized.shuffled/news.en.heldout-000NN-of-00050")
    return Source("lm1b", lambda: listing(given, files), rule, sum(path.stat().st_size for path in files),
                  lambda: shards(files), detokenise=True)


def shards(files: list[Path]) -> Iterator[Batch]:
    before = 0
    for path in files:
        with readable(path), open(path, "rb") as file:
            for numbers, texts in lines(file, str(path)):
                yield Batch(str(path), numbers, texts, split_of(path.as_posix()), before + file.tell())
        before += path.stat().st_size


def tarball(path: Path) -> Iterator[Batch]:
    """The lines of the benchmark's files in a .tar.gz, read as a stream, in its order; all else in it is passed over."""
    found = set()
    with readable(path), unpacked(path, ".gz") as (raw, file):
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isreg() and (split := split_of(member.name)):
                    found.add(split)
                    for numbers, texts in lines(archive.extractfile(member), f"{path}/{member.name}"):
                        yield Batch(f"{path}/{member.name}", numbers, texts, split, raw.tell())
        while file.read(BLOCK):  # to the end, where gzip's checksum stands
            pass
    if missing := SHARDS.keys() - found:
        raise UserError(f"{path}: holds no {' and no '.join(sorted(missing))} files of lm1b; give the published tarball")


def download(url: str, path: Path, size: int, checksum: str) -> Path:
    """Downloads `url` to `path`, unless it is there, and returns `path`. What a broken attempt left in path.part is gone
    on with; whoever else wants it waits.

    Raises UserError where the server has no such file, or another one; nothing but the whole right file is ever `path`.
    """
    from filelock import FileLock

    part, lock = (path.with_name(f"{path.name}.{end}") for end in ("part", "lock"))
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not path.is_file():
                fetch(url, part, size)
                if (found := sha256(part)) != checksum:
                    part.unlink()
                    raise UserError(f"{url}: gives another file than the published one (sha256 {found[:16]}, not "
                                    f"{checksum[:16]}); removed; try again, or give another --data-url")
                part.rename(path)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the file
    return path


def fetch(url: str, part: Path, size: int) -> None:
    """Appends to `part` what `url` has behind it, in as many attempts as it takes, until it has `size` bytes."""
    from tqdm import tqdm

    furthest, failures = 0, 0
    with open(part, "ab", buffering=0) as file, tqdm(total=size, desc=part.stem, unit="B", unit_scale=True,
                                                     unit_divisor=1024, file=sys.stderr, mininterval=1) as bar:
        while (have := file.tell()) < size:
            bar.n, fault = have, "the connection was closed"
            try:
                request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
                with urllib.request.urlopen(request, timeout=60) as answer:
                    if have and answer.status != 206:  # it knows no ranges
                        have = restart(file)
                    length = int(answer.headers["Content-Length"] or size - have)
                    if have + length != size:
                        raise UserError(f"{url}: has {have + length} bytes instead of {size}; give another --data-url, or "
                                        "a copy by --data-dir")
                    while file.tell() < size and (block := answer.read(min(BLOCK, size - file.tell()))):
                        bar.update(len(block))
                        with writable(part):
                            while block:
                                block = block[file.write(block) :]
            except urllib.error.HTTPError as error:
                if error.code == 416:  # another file's part
                    restart(file)
                elif error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{url}: {error}; give another --data-url, or a copy by --data-dir") from None
                fault = str(error)
            except (http.client.InvalidURL, ValueError) as error:
                raise UserError(f"--data-url {url}: {error}") from None
            except (OSError, http.client.HTTPException) as error:
                fault = str(error)
            failures = 0 if file.tell() > furthest else failures + 1
            furthest = max(furthest, file.tell())
            if failures == RETRIES:
                raise UserError(f"{url}: {fault}, {RETRIES} times; {file.tell()} of {size} bytes are kept, the same command "
                                "goes on; or give another --data-url, or a copy by --data-dir")
            if failures:
                bar.set_postfix_str(fault)
                time.sleep(WAIT * 2 ** (failures - 1))
        os.fsync(file.fileno())


def restart(file: BinaryIO) -> int:
    """Empties a file; returns 0, its new length."""
    file.truncate(0)
    return file.seek(0)


def replace_file(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); the same command goes on") from None


# A pattern that begins with plain characters is searched for ten times as fast: so each looks behind after its first ones.
DETOKENISED = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"http(s?) : / / ?", r"http\1://"),
    (r" '(s|t|m|d|re|ve|ll|S|T|M|D|RE|VE|LL)\b", r"'\1"),  # it 's, isn 't
    (r" ([.?!,:;])(?!\S)", r"\1"),
    (r"\$ (?=\d)", "$"),
    (r"£ (?=\d)", "£"),
    (r'"(?<!\S") ([^"\n]*?) "(?=[\s.?!,:;)\]]|$)', r'"\1"'),
    (r"'(?<!\S') ([^'\n]*?) '(?=[\s.?!,:;)\]]|$)", r"'\1'"),
    (r"\( ([^()\n]*?) \)", r"(\1)"),
    (r"\[ ([^\[\]\n]*?) \]", r"[\1]"),
    (r" / (?<=\w / )(?=\w)", "/"),
)]


def detokenise(text: str) -> str:
    """Undoes what tokenising did to lm1b's punctuation; of many lines at once, none of which touches another."""
    for pattern, replacement in DETOKENISED:
        text = pattern.sub(replacement, text)
    return text


# --------------------------------------------------------------------------------------------------------------- owt
# OpenWebText (Gokaslan and Cohen 2019): 8,013,769 web pages.


def owt(given: Path | None) -> Source:
    """The hub's parquet files, as they are today, or one's own parquet or text files in the order of their names."""
    rule = "the last 100000 documents, or one in twenty if there are fewer than two million"
    if given is None:
        return Source("owt", lambda: f"hub:{OWT}", rule, 0, lambda: last_held_out(hub_files()))
    files = [given] if given.is_file() else sorted(
        path for path in given.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if path.suffix == ".parquet"] or [
        path for path in files if path.name.endswith((".txt", ".txt.gz", ".txt.xz"))]
    if not files:
        raise UserError(f"--data-dir {given}: holds no .parquet, .txt, .txt.gz or .txt.xz")
    return Source("owt", lambda: listing(given if given.is_dir() else given.parent, files), rule,
                  sum(path.stat().st_size for path in files), lambda: last_held_out(files))


@functools.cache
def hub_files() -> list[Path]:
    """The paths of OpenWebText's parquet files, which the hub's own client downloads, resumes and keeps."""
    import huggingface_hub

    parquet()
    try:
        folder = huggingface_hub.snapshot_download(OWT, repo_type="dataset", allow_patterns="*.parquet")
    except Exception as error:  # its client raises many kinds
        raise UserError(f"--dataset owt: could not be downloaded ({type(error).__name__}); the same command goes on, or "
                        "give a copy by --data-dir") from None
    if not (files := sorted(Path(folder).rglob("*.parquet"))):
        raise UserError(f"--dataset owt: {OWT} has no parquet files any more; give a copy by --data-dir")
    return files


def parquet():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--dataset owt: parquet files are read by pyarrow; pip install pyarrow, or give text files by "
                        "--data-dir") from None
    return pyarrow


@contextmanager
def opened(path: Path) -> Iterator:
    """A parquet file with a column `text` of strings."""
    pa = parquet()
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field("text").type if "text" in schema.names else None
            if kind not in (pa.string(), pa.large_string()):
                raise UserError(f"{path}: has no column text of strings, but {', '.join(schema.names)}; rename its column")
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            bounded(path, sum(group.total_byte_size for group in groups))
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); put a whole copy in its place") from None


def parquet_file(path: Path) -> Iterator[Batch]:
    """The texts of a parquet file, its rows counted from 1."""
    with opened(path) as file:
        row, size = 0, path.stat().st_size
        for some in file.iter_batches(128, columns=["text"]):
            bounded(path, some.nbytes)
            texts = some.column(0).to_pylist()
            kept = [(i, text) for i, text in enumerate(texts, start=row + 1) if text and text.strip()]
            row += len(texts)
            yield Batch(str(path), [i for i, _ in kept], [text for _, text in kept], None,
                        row * size // file.metadata.num_rows)


def rows(path: Path) -> int:
    """How many rows a parquet file has, or lines a text."""
    if path.suffix == ".parquet":
        with opened(path) as file:
            return file.metadata.num_rows
    with readable(path), unpacked(path) as (_, file):
        total, last = 0, b"\n"
        while block := file.read(BLOCK):
            total, last = total + block.count(b"\n"), block[-1:]
        return total + (last != b"\n")


def last_held_out(files: list[Path]) -> Iterator[Batch]:
    """The documents of these files, the last of them held out."""
    totals = [rows(path) for path in files]
    left, before = sum(totals) - min(100_000, sum(totals) // 20), 0  # rows to train on, bytes read
    for path, total in zip(files, totals):
        for batch in parquet_file(path) if path.suffix == ".parquet" else text_file(path):
            cut = bisect_right(batch.numbers, left)
            for split, part in ("train", slice(cut)), ("heldout", slice(cut, None)):
                yield batch._replace(numbers=batch.numbers[part], texts=batch.texts[part], split=split,
                                     position=before + batch.position)
        left, before = left - total, before + path.stat().st_size
