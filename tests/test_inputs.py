"""Bad input, made by chance and by hand: texts, settings, token files, tokenizers, checkpoints and command lines.

Every one ends in one line and status 2, or is good enough to work with; never in a traceback, a hang, or a file elsewhere.
"""

import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import shlex
import shutil
import sys
import tarfile
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tally
from hypothesis import given
from hypothesis import strategies as st
from nursery import MAINS

import baselines
import data
import distill
import flm
import sources
from run import flag, guard
from sources import UserError
from test_flm import TINY

STEP = f"--max-steps 2 --stop-after 1 --run-dir r {TINY}"  # one step, saved, and no more


def attempt(program: str, line: str | list[str]) -> tuple[int, str]:
    """Status and last line of standard error of a command. Fails for a traceback, a second line or a file elsewhere."""
    argv, err, before = line if isinstance(line, list) else shlex.split(line), io.StringIO(), set(os.listdir(".."))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [program, *argv])
        try:
            status = guard(MAINS[program], program != "evaluate.py")
        except SystemExit as stop:  # --help
            status = stop.code
    torch.set_num_threads(1)
    lines = [line for line in err.getvalue().splitlines() if line.startswith(f"{program}:")]
    assert status == 0 and not lines or status == 2 and len(lines) == 1, (status, err.getvalue())
    assert set(os.listdir("..")) == before and "Traceback" not in err.getvalue()
    tally["inputs tried"] += 1
    tally["inputs refused in one line"] += status == 2
    return status, lines[0] if lines else ""


@contextlib.contextmanager
def playground(base: Path):
    """A folder with a flow and a map of it, and their token files, to work in, and a copy of them to restore."""
    work, good = base / "work", base / "good"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        torch.set_num_threads(1)
        Path("a.txt").write_text("".join(f"{word}{i}\n" for i in range(300) for word in ("one ", "twenty ")))
        assert attempt("flm.py", f"{STEP} --dataset a.txt --tokenizer chars --seq-len 16")[0] == 0
        assert attempt("distill.py", "--run-dir r --max-steps 2 --stop-after 1 --no-bf16")[0] == 0
        shutil.copytree(work, good)
        yield


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with playground(tmp_path_factory.mktemp("inputs")):
        yield


@pytest.fixture(autouse=True)
def restored():
    restore()


def restore() -> None:
    for name in "r", "data":
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(Path("../good", name), name)


kinds = st.sampled_from(("flip", "cut", "insert", "delete"))
where = st.floats(0, 1, allow_subnormal=False)  # which the programs switch off
edits = st.lists(st.tuples(kinds, where, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def edited(content: bytes, changes: list) -> bytes:
    for kind, place, more in changes:
        i = int(place * (len(content) - 1)) if content else 0
        content = {"flip": content[:i] + more + content[i + len(more) :], "cut": content[:i],
                   "insert": content[:i] + more + content[i:], "delete": content[:i] + content[i + len(more) :]}[kind]
    return content


numbers = st.integers(-3, 40) | st.sampled_from((10**13, -(10**30), 1 << 63, 0.5, -0.1, 1e300, float("inf"), float("nan")))
strings = st.text(max_size=5) | st.sampled_from(("a.txt", "words", "chars", "bpe", "/etc/passwd", "..", "linear", "muon"))
values = numbers | strings | st.sampled_from((None, True, False, [], [0], [1, 2], {}, {"a": 1}))


def replaced(content, path: list[int], value):
    """Nested dicts and lists with one part, which a path of numbers leads to, in the place of which stands the value."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = keys[path[0] % len(keys)]
    new = content.copy()
    new[key] = replaced(content[key], path[1:], value)
    return new


paths = st.lists(st.integers(0, 60), min_size=1, max_size=4)

# -------------------------------------------------------------------------------------------------------------- texts

pieces = st.sampled_from((b"\n", b"a\r\n", b"\xef\xbb\xbf", b"a b\n"))
texts = st.text(max_size=60).map(str.encode) | st.binary(max_size=60) | pieces


@given(st.lists(texts, max_size=30).map(b"".join), st.sampled_from((".txt", ".txt.gz", ".txt.xz")), st.none() | edits,
       st.sampled_from(("chars", "bpe --vocab-size 258", "bpe --vocab-size 300")), st.booleans())
def test_texts(content, suffix, changes, tokenizer, packing):
    content = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.xz": lzma.compress}[suffix](content)
    path = Path(f"c{suffix}")
    path.write_bytes(content if changes is None else edited(content, changes))
    more = "--packing --seq-len 4" if packing else "--no-packing --seq-len 100"
    status, line = attempt("flm.py", f"{STEP} --overwrite --dataset {path} --tokenizer {tokenizer} {more}")
    assert status == 0 or str(path) in line or "--vocab-size" in line or "--seq-len" in line


WORDS = "".join(f"word {i}\n" for i in range(40))


@pytest.mark.parametrize("name, text, wrong", (
    ("empty", b"", "no text in it"), ("blank", b"\n\n \n", "no text in it"), ("one character", b"a\na\n", ""),
    ("two lines", b"ab\nba\n", ""), ("one line", b"ab", ""), ("crlf", WORDS.replace("\n", "\r\n").encode(), ""),
    ("mark", b"\xef\xbb\xbf" + WORDS.encode(), ""), ("nul", b"a\0b\n" * 40, ""),
    ("surrogate", b"ok\na\xed\xa0\x80b\n", "c.txt:2: not UTF-8"), ("utf16", WORDS.encode("utf-16"), "not UTF-8"),
    ("right to left", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\n".encode() * 40, ""),
    ("combining", "e\u0301a\u0308\u0323\n".encode() * 40, ""), ("separators", "a\u2028b\x85c\x0cd\x1ee\n".encode() * 40, ""),
    ("long line", b"ab " * 3_500_000, ""), ("too long a line", b"ab " * 7_000_000, "a line of more than 16 MiB")))
def test_texts_by_hand(name, text, wrong):
    """The characters of a good one come back as they went in, whatever they are; a line break is only what is one."""
    Path("c.txt").write_bytes(text)
    packing = "--packing --seq-len 2" if len(text) < 10**6 else "--packing --seq-len 64"
    status, line = attempt("flm.py", f"{STEP} --overwrite --dataset c.txt --tokenizer chars {packing}")
    assert status == (2 if wrong else 0) and wrong in line
    if not wrong:
        corpus = data.prepare("c.txt", "chars", 64 if len(text) > 10**6 else 2, True, 0, 8)
        lines = [line for line in text.decode("utf-8-sig").replace("\r\n", "\n").split("\n") if line.strip()]
        ids = corpus.splits["train"].tolist() if corpus.borrowed else [*corpus.splits["train"], *corpus.splits["heldout"]]
        assert sorted(corpus.tokenizer.decode(ids).split("\n")) == sorted(lines)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=4))
def test_every_tokenizer_gives_back_what_it_was_given(lines):
    for tokenizer in bpe(), data.Tokenizer({"kind": "chars", "chars": "".join(sorted(set("".join(lines))))}):
        for text, ids in zip(lines, tokenizer.encode(lines)):
            assert tokenizer.decode(ids) == text.strip("\n")


@functools.cache
def bpe() -> data.Tokenizer:
    return data.make_tokenizer("bpe", sources.find("a.txt"), 270)


def test_what_unpacks_to_more_than_a_text_does_is_refused(monkeypatch):
    """At the size that sources.BOMB states, and in a tarball as well."""
    monkeypatch.setattr(sources, "BOMB", (2**22, 200))
    for name, pack in (("b.txt.gz", gzip.compress), ("b.txt.xz", lzma.compress)):
        Path(name).write_bytes(pack(b"\n" * 2**25))
        status, line = attempt("flm.py", f"{STEP} --overwrite --dataset {name} --tokenizer chars --seq-len 16")
        assert status == 2 and f"{name}: unpacks to more than 4 MiB and 200 times its size" in line
    with tarfile.open("b.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("training-monolingual.tokenized.shuffled/news.en-00001-of-00100")
        info.size = 2**25
        archive.addfile(info, io.BytesIO(b"\n" * info.size))
    status, line = attempt("flm.py", f"{STEP} --overwrite --dataset lm1b --data-dir b.tar.gz --tokenizer chars --seq-len 16")
    assert status == 2 and "b.tar.gz: unpacks to more than 4 MiB" in line
    Path("good.txt.gz").write_bytes(gzip.compress(WORDS.encode() * 1000))
    assert attempt("flm.py", f"{STEP} --overwrite --dataset good.txt.gz --tokenizer chars --seq-len 16")[0] == 0


def test_members_of_a_tarball_never_leave_it():
    """Absolute names, `..`, links and devices: nothing is unpacked, and what is no file is passed over."""
    text, names = WORDS.encode(), []
    with tarfile.open("t.tar.gz", "w:gz") as archive:
        for split, name in (("training", "news.en-00001-of-00100"), ("heldout", "news.en.heldout-00000-of-00050")):
            for start in "", "/tmp/evil/", "../../evil/", "x/":
                info = tarfile.TarInfo(f"{start}{split}-monolingual.tokenized.shuffled/{name}")
                info.size = len(text)
                names.append(info.name)
                archive.addfile(info, io.BytesIO(text))
            for kind in tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE:
                info = tarfile.TarInfo(f"y/{split}-monolingual.tokenized.shuffled/{name}")
                info.type, info.linkname = kind, "/etc/passwd"
                archive.addfile(info)
    assert attempt("flm.py", f"{STEP} --overwrite --dataset lm1b --data-dir t.tar.gz --tokenizer chars --seq-len 16")[0] == 0
    corpus = data.prepare("lm1b", "chars", 16, True, 0, 8, data_dir="t.tar.gz")
    assert corpus.meta["documents"] == {"train": 160, "heldout": 160}
    assert not Path("/tmp/evil").exists() and not list(Path("..").rglob("news.en*"))


# -------------------------------------------------------------------------------------------------------- run folders


@given(st.sampled_from(("config.json", "fmlm.config.json")), edits | st.tuples(paths, values))
def test_settings(name, change):
    restore()
    path = Path("r", name)
    if isinstance(change, tuple):
        path.write_text(json.dumps(replaced(json.loads(path.read_text()), *change)))
    else:
        path.write_bytes(edited(path.read_bytes(), change))
    program = "flm.py" if name == "config.json" else "distill.py"
    status, line = attempt(program, "--run-dir r --resume --stop-after 2")
    attempt("distill.py", "--run-dir r --overwrite --max-steps 2 --stop-after 1")


@pytest.mark.parametrize("name", ("cond_width", "lr", "seed"))
def test_true_is_no_number(name):
    path = Path("r/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: True}))
    status, line = attempt("flm.py", "--run-dir r --resume")
    assert status == 2 and "config.json" in line and f"--{name.replace('_', '-')} True" in line


names = st.sampled_from(("meta.json", "tokenizer.json", "counts.npz", "train.bin", "heldout.bin"))


@given(names, edits | st.tuples(paths, values))
def test_token_files(name, change):
    restore()
    path = next(Path("data").glob(f"*/{name}"))
    if isinstance(change, list):
        path.write_bytes(edited(path.read_bytes(), change))
    elif name.endswith("json"):
        path.write_text(json.dumps(replaced(json.loads(path.read_text()), *change)))
    line = f"{STEP} --overwrite --dataset a.txt --tokenizer chars --seq-len 16"
    status, said = attempt("flm.py", line)
    assert status == 0 or str(path.parent) in said
    if status == 2:  # as the line says
        shutil.rmtree(path.parent)
        assert attempt("flm.py", line)[0] == 0


@pytest.mark.parametrize("arrays", (dict(x=1), dict(batches=[1, 2], counts=[0] * 18, train=(0, 0), heldout=(0, 0)),
                                    dict(batches=1, counts=[1], train=(0, 0), heldout=(0, 0)),
                                    dict(batches=-1, counts=[-1] * 18, train=(-1, 0), heldout=(0, 0))))
def test_progress_that_is_damaged_begins_again(arrays):
    """What a preparation that was cut off has left."""
    path = next(Path("data").glob("a-*"))
    whole = {name: (path / name).read_bytes() for name in ("train.bin", "heldout.bin")}
    path = path.rename(path.with_name(f".{path.name}.part"))
    (path / "meta.json").unlink()
    np.savez(path / "counts.npz", **arrays)
    assert attempt("flm.py", f"{STEP} --overwrite --dataset a.txt --tokenizer chars --seq-len 16")[0] == 0
    assert all(next(Path("data").glob(f"a-*/{name}")).read_bytes() == content for name, content in whole.items())


@pytest.mark.parametrize("name, line", (("config.json", "--resume"), ("tokenizer.json", "--sample"), ("flm.log.jsonl", "")))
def test_deep_nesting_is_one_line_or_nothing(name, line):
    Path("r", name).write_text("[" * 200_000)
    status, said = attempt("flm.py", f"--run-dir r {line or '--resume --stop-after 2'}")
    assert status == (2 if line else 0) and (name in said or not line)


@given(st.sampled_from(("chars", "bpe", "gpt2", "ids")), edits | st.tuples(paths, values))
def test_tokenizers(kind, change):
    content = {"chars": {"kind": "chars", "chars": "abc"}, "bpe": bpe().content, "gpt2": {"kind": "none"},
               "ids": {"kind": "ids", "vocab_size": 9}}[kind]
    text = json.dumps(replaced(content, *change)).encode() if isinstance(change, tuple) else edited(
        json.dumps(content).encode(), change)
    path = Path("r/tokenizer.json")
    path.write_bytes(text)
    status, line = attempt("flm.py", "--sample --run-dir r --num-samples 1 --sample-steps 1")
    assert status == 2 and ("tokenizer.json" in line)
    with contextlib.suppress(UserError):
        tokenizer = data.Tokenizer.load(path)
        tokenizer.decode(range(min(tokenizer.vocab_size, 9)))
        tokenizer.encode(["abc"])


tensors = st.sampled_from((torch.zeros(1), torch.zeros(18, 16).to_sparse(), torch.zeros(1).expand(10**6, 10**6),
                           torch.empty(0), torch.zeros(16, 16, dtype=torch.long), torch.full((18, 16), torch.nan)))


@given(st.sampled_from(("flm", "fmlm")), paths, values | tensors)
def test_checkpoints(kind, path, value):
    """With one of its parts, however deep, another."""
    restore()
    file = Path("r", f"{kind}.pt")
    torch.save(replaced(torch.load(file, weights_only=True), path, value), file)
    program = "flm.py" if kind == "flm" else "distill.py"
    for line in "--sample --num-samples 1 --sample-steps 1", "--resume --stop-after 2":
        status, said = attempt(program, f"--run-dir r {line}")
        assert status == 0 or f"{kind}.pt" in said or "not a number" in said or "exploded" in said


@given(edits, st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
def test_pickles(changes, method):
    """The pickled record of a checkpoint edited, and its checksum made to match: what a stranger could send."""
    restore()
    with zipfile.ZipFile("../good/r/flm.pt") as old, zipfile.ZipFile("r/flm.pt", "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, edited(content, changes) if name.endswith("data.pkl") else content)
    attempt("flm.py", "--run-dir r --sample --num-samples 1 --sample-steps 1")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_checkpoint_is_never_run():
    torch.save({"kind": Evil()}, "r/flm.pt")
    for line in "--sample", "--resume":
        status, said = attempt("flm.py", f"--run-dir r {line}")
        assert status == 2 and "r/flm.pt: not a whole checkpoint" in said and not Path("evil").exists()


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused():
    with zipfile.ZipFile("r/flm.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("flm/data.pkl", b"\0" * 2**24)
    status, said = attempt("flm.py", "--run-dir r --sample")
    assert status == 2 and "larger than the file" in said


# ------------------------------------------------------------------------------------------------------ command lines

CONFIGS = {"flm.py": flm.Config, "distill.py": distill.Config, "baselines.py": baselines.Config}
odd = ("", "0", "-1", "1.5", "nan", "inf", "-inf", "1e309", "9" * 30, "9" * 5000, "abc", "é", "\udc80", "\n", "/", "..",
       "--", "-", "[MASK]", "[MASK:999999999]", "a" * 300, "0x10", "1_0", " 1 ", "True", "words", "a.txt", "none", "%s",
       "{}", "x_", "_")
words = st.sampled_from(odd) | st.text(st.characters(exclude_characters="\0"), max_size=6)


@st.composite
def command_lines(draw) -> tuple[str, list[str]]:
    program = draw(st.sampled_from(list(CONFIGS)))
    keep = ("run_dir", "out", "dataset", "data_dir", "taught")  # which write, or read, where they are told to
    argv = []
    for f in draw(st.lists(st.sampled_from([f for f in fields(CONFIGS[program]) if f.name not in keep]), max_size=4)):
        good = st.sampled_from(f.metadata["choices"] or ("1", "2", "3", "0.5"))
        kind = draw(st.integers(0, 19))
        argv.append(flag(f.name) if kind else draw(words))
        if f.type in (bool, bool | None):
            argv[-1] = argv[-1].replace("--", draw(st.sampled_from(("--", "--no-"))))
        elif kind != 1:
            argv.append(draw(words if kind < 5 else good))
    return program, argv


@given(command_lines(), st.sampled_from(("--overwrite", "--overwrite", "--resume", "--sample --sample-steps 2", "")))
def test_command_lines(command, more):
    restore()
    program, argv = command
    base = STEP if program == "flm.py" and more != "--resume" else "--run-dir r --max-steps 2 --stop-after 1"
    base = f"{base} --dataset a.txt --tokenizer chars --seq-len 16" if base == STEP else base
    attempt(program, [*shlex.split(f"{base} {more}"), *argv])
