"""Fuzzed texts, prompts, command lines and files: each gives a result or one line on stderr."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import data
import distill
import flm
from data import UserError
from test_flm import TEXT, TINY

FLOW = f"{TINY} --width 8 --eval-every 1 --max-steps 1 --run-dir r".split()
MAP = "--run-dir r --device cpu".split()
SAMPLE = [*MAP, *"--sample --num-samples 2 --sample-steps 2".split()]

def attempt(program, argv):
    """The message of a command on stderr, or "" if it succeeds. Fails for any other end."""
    name, err = f"{program.__name__}.py", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [name, *argv])
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            flm.run_command(program.main)
    torch.set_num_threads(1)
    if end.value.code == 0:
        return ""
    message = err.getvalue().rpartition(f"{name}: ")[2]
    assert end.value.code == 2 and message.count("\n") == 1, err.getvalue()
    return message

@pytest.fixture(scope="module", autouse=True)
def run_folder(tmp_path_factory):
    """A run folder r with a flow and a map, and its copy `good`. Later commands do not train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("inputs"))
        Path("a.txt").write_text(TEXT)
        assert not attempt(flm, [*FLOW, "--condition-prob", ".5"])
        assert not attempt(distill, [*MAP, "--max-steps", "1"])
        shutil.copytree("r", "good")
        patch.setattr(flm, "train", lambda model, *rest: model.eval())
        yield

@pytest.fixture(autouse=True)
def restored(run_folder):
    shutil.copytree("good", "r", dirs_exist_ok=True)

@pytest.fixture(scope="module")
def tokenizers():
    corpora = [data.prepare("a.txt", kind, 16, False, 280) for kind in ("chars", "bpe")]
    return {corpus.tokenizer.kind: corpus.tokenizer for corpus in corpora}

odd = st.sampled_from([b"\n", b"\r\n", b"\xef\xbb\xbf", b"\0", b" \t\n", b"\x1c\n", b"a b\n"])
line = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode)
texts = st.lists(line | line | odd | st.binary(max_size=4), max_size=20).map(b"".join)
kinds = st.sampled_from(["chars", "bpe"])

@settings(max_examples=100)
@given(texts, kinds, st.booleans())
@example(b"a", "bpe", False)
@example(b"ok\na\xed\xa0\x80b\n", "chars", True)
@example("utf16\n".encode("utf-16"), "bpe", True)
@example(b"ab " * 2**18, "chars", True)
@example(b"a\n" + b"b" * 2**14 + b"\n\nc", "bpe", False)
@example("e\u0301 \u05e9\u05dc a\u2028b\x85c\x0cd\r\n".encode() * 40, "chars", False)
def test_texts(content, kind, packing):
    """Rows decode to the documents of the text, or a UserError gives the reason."""
    shutil.rmtree("data", ignore_errors=True)
    Path("c.txt").write_bytes(content)
    L, documents = 2 if packing else 32, None
    with contextlib.suppress(UnicodeDecodeError):
        lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
        documents = [line for line in lines if line and not line.isspace()]
    try:
        corpus = data.prepare("c.txt", kind, L, packing, 280)
    except UserError as error:
        assert "\n" not in str(error)
        if documents is None:
            assert "c.txt" in str(error) and "convert it to UTF-8" in str(error)
        elif documents:
            assert not packing and "use a larger one" in str(error)
        return
    ids = corpus.tokenizer.encode(documents)
    short = [text for text, row in zip(documents, ids) if packing or len(row) < L]
    assert corpus.meta["skipped"] == len(documents) - len(short)
    written = [split for split, count in corpus.meta["tokens"].items() if count]
    if packing:
        joined = [i for split in written for i in corpus.splits[split].tolist()]
        decoded = corpus.tokenizer.decode(joined).split("\n")
    else:
        rows = [corpus.batch(split, range(corpus.rows(split))) for split in written]
        decoded = [corpus.tokenizer.decode(row) for row in torch.cat(rows)]
    assert Counter(decoded) == Counter(short)

pieces = st.sampled_from(["a", " ", "[MASK]", "[MASK:3]", "[MASK:9999]", "[MASK:x]", "_", "\n"])
prompts = st.text(max_size=8) | st.lists(pieces, max_size=12).map("".join)

@settings(max_examples=200)
@given(prompts.filter(bool), st.booleans(), st.booleans(), kinds)
@example("\udc80", False, True, "bpe")
def test_prompts_and_infills(tokenizers, text, infill, packing, kind):
    """The known tokens are those of the text without its gaps.

    Bytes of a command line that are not UTF-8 (lone surrogates) are ignored.
    """
    tokenizer, config = tokenizers[kind], flm.Config(seq_len=16, packing=packing)
    model = SimpleNamespace(tokenizer=tokenizer, config=config)
    try:
        known, shown = flm.parse_known(model, "" if infill else text, text if infill else "")
    except UserError:
        return
    assert known.shape == (16,) and -1 in known and known.max() < tokenizer.vocab_size
    if infill:
        text = re.sub("_" if kind == "chars" else r" ?\[MASK(:\d{1,4})?\]", "", text)
    given_ids = [i for i in known[:shown].tolist() if i >= 0]
    assert tokenizer.decode(given_ids) == text.encode(errors="ignore").decode().strip("\n")

WORDS = ["", "0", "-1", "1.5", "nan", "inf", "1e309", "9" * 30, "9" * 5000, "abc", "\udc80", "a\nb",
         "/", "..", "--", "[MASK]", "a" * 300, "0x10", "1_0", "a.txt", "none", "%s", "_"]
SLOW = ("depth", "num_samples", "sample_steps")  # a huge value is valid, and takes days
SAFE = [f for f in fields(distill.Config) if f.name not in ("run_dir", "data_dir", "tokenizer")]

@st.composite
def flags(draw):
    """Up to three flags; about half of the values have the right type."""
    argv = []
    for f in draw(st.lists(st.sampled_from(SAFE), min_size=1, max_size=3)):
        flag = flm.flag_of(f.name)
        if f.type in (bool, bool | None):
            argv.append(draw(st.sampled_from([flag, flag.replace("--", "--no-")])))
        else:
            good = f.metadata.get("choices") or ["1", "2", "0.5", "a.txt"]
            bad = WORDS + [str(10**13), str(2**61)] * (f.name not in SLOW)
            argv += [flag, draw(st.sampled_from(good) | st.sampled_from(bad))]
    return argv

@settings(max_examples=120)
@given(flags(), st.sampled_from([(flm, FLOW), (flm, SAMPLE), (distill, MAP), (distill, SAMPLE)]))
def test_command_lines(argv, command):
    program, start = command
    attempt(program, [*start, "--overwrite", *argv])
    shutil.copytree("good", "r", dirs_exist_ok=True)

@pytest.mark.parametrize("program", [flm, distill])
@pytest.mark.parametrize("argv", [
    ["--help"], ["a\nb"], ["--lr"], ["--wdth", "3"], ["--"], ["--run-dir", "a.txt"],
    ["--run-dir", "a.txt/r"], ["--prompt", "a\nb" * 20, *SAMPLE],
    [*FLOW, "--overwrite", "--width", str(2**61)], [*FLOW, "--threads", str(10**13)]])
def test_command_lines_by_hand(program, argv):
    assert bool(attempt(program, argv)) == (argv != ["--help"])

values = st.integers(-3, 20) | st.text(max_size=5) | st.binary(max_size=4) | st.sampled_from(
    [..., 10**13, -(10**30), 2**63, 0.5, 1e300, float("nan"), float("inf"), None, True, [], [1, 2],
     {"a": 1}, "a.txt", "chars", "bpe", "muon"])

def edited(content, place, value):
    """A JSON object with another value of one key, without it (...), or with other bytes."""
    if isinstance(value, bytes):
        i = 37 * place % len(content)
        return content[:i] + value + content[i + 4 :]
    parsed = json.loads(content)
    parsed[list(parsed)[place % len(parsed)]] = value
    return json.dumps({k: v for k, v in parsed.items() if v is not ...}).encode()

@settings(max_examples=120)
@given(st.sampled_from([(flm, "config.json"), (distill, "fmlm.config.json")]),
       st.integers(0, 40), values)
@example((flm, "config.json"), 11, True)
def test_config_files(file, place, value):
    program, name = file
    content = edited(Path("good", name).read_bytes(), place, value)
    assume(not re.search(rb'"depth": \d{6,18}\D', content))  # valid, and takes days
    Path("r", name).write_bytes(content)
    attempt(program, [*MAP, "--resume"])
    shutil.copy(Path("good", name), "r")

@settings(max_examples=100)
@given(kinds, st.integers(0, 40), values)
def test_tokenizer_files(tokenizers, kind, place, value):
    """A changed tokenizer.json is refused by its run; one that can be loaded can decode."""
    path, good = Path("r/tokenizer.json"), json.dumps(tokenizers[kind].content).encode()
    path.write_bytes(edited(good, place, value))
    with contextlib.suppress(UserError):
        tokenizer = data.Tokenizer.load(path)
        assert isinstance(tokenizer.decode(range(min(tokenizer.vocab_size, 9))), str)
    if path.read_bytes() != good or kind == "bpe":
        assert "tokenizer.json" in attempt(flm, SAMPLE)
    shutil.copy("good/tokenizer.json", path)
