"""Fuzzed texts, prompts and command lines: each gives a result or one line on stderr."""

import re
import shutil
from collections import Counter
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nursery import attempt

import data
import distill
import flm
from extras import baselines
from test_flm import TEXT, TINY

FLOW = f"{TINY} --width 8 --max-steps 1 --sample-steps 2 --run-dir r"
NEW = f"{FLOW} --run-dir q"
MAP = "--run-dir r --device cpu --max-steps 1"
PROGRAMS = flm, distill, baselines
SAMPLE = "--run-dir r --device cpu --sample --num-samples 2 --sample-steps 2"

@pytest.fixture(scope="module", autouse=True)
def run_folder(tmp_path_factory):
    """The run folder r with a flow, a map and baselines, and its copy `good`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("inputs"))
        Path("a.txt").write_text(TEXT)
        Path("other.txt").write_text(f"{TEXT}abc\n")
        assert not attempt(flm, f"{FLOW} --condition-prob .5")
        for program, model in ((distill, ""), (baselines, ""), (baselines, "--model ar")):
            assert not attempt(program, f"{MAP} {model}")
        shutil.copytree("r", "good")
        yield

@pytest.fixture(autouse=True)
def restored(run_folder):
    shutil.copytree("good", "r", dirs_exist_ok=True)
    shutil.rmtree("q", ignore_errors=True)

fuzz = partial(settings, derandomize=True, database=None, deadline=None,
               suppress_health_check=list(HealthCheck))
odd = st.sampled_from([b"\n", b"\r\n", b"\xef\xbb\xbf", b"\0", b" \t\n", b"\x1c\n", b"a b\n"])
line = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode)
texts = st.lists(line | line | odd | st.binary(max_size=4), max_size=20).map(b"".join)
kinds = st.sampled_from(["chars", "bpe"])

@fuzz(max_examples=60)
@given(texts, kinds, st.booleans())
@example(b"a\n" + b"b" * 2**14 + b"\n\nc", "bpe", False)
@example("e\u0301 \u05e9\u05dc a\u2028b\x85c\x0cd\r\n".encode() * 40, "chars", False)
def test_texts(content, kind, packing):
    """Token files decode to the documents of the text, or a UserError gives the reason."""
    shutil.rmtree("data", ignore_errors=True)
    Path("c.txt").write_bytes(content)
    try:
        corpus = data.prepare("c.txt", kind, 2 if packing else 32, packing, 280)
    except data.UserError as error:
        reasons = "c.txt.*convert it to UTF-8|text is empty|documents have --seq-len 32 or more"
        assert "\n" not in str(error) and re.search(reasons, str(error))
        return
    lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
    documents = [line for line in lines if line and not line.isspace()]
    ids = corpus.tokenizer.encode(documents)
    short = [text for text, row in zip(documents, ids) if packing or len(row) < 32]
    counts = corpus.meta["tokens"]
    decoded = [corpus.tokenizer.decode(corpus.splits[split]) for split in counts if counts[split]]
    assert Counter(filter(None, "\n".join(decoded).split("\n"))) == Counter(short)
    assert corpus.meta["skipped"] == len(documents) - len(short)

@cache
def tokenizer_of(kind):
    return data.prepare("a.txt", kind, 16, False, 280).tokenizer

pieces = st.sampled_from(["a", " ", "[MASK]", "[MASK:3]", "[mask]", "[MASK", "]", "_", "\n"])
prompts = st.text(max_size=8) | st.lists(pieces, max_size=12).map("".join)

@fuzz(max_examples=200)
@given(prompts, st.booleans(), kinds)
@example("\udc80", True, "bpe")
def test_prompts(text, packing, kind):
    """The known tokens are those of the text, with one unknown token in each gap."""
    tokenizer, config = tokenizer_of(kind), flm.Config(seq_len=16, packing=packing)
    model = SimpleNamespace(tokenizer=tokenizer, config=config)
    try:
        known = flm.parse_prompt(model, text)
    except data.UserError:
        return
    parts = re.split("_" if kind == "chars" else r" ?\[MASK\]", text)
    expected = "".join(parts).encode(errors="ignore").decode()
    assert tokenizer.decode(known[known >= 0]) == expected.strip("\n")
    gaps, unknown = len(parts) - 1, known < 0
    assert known.shape == (16,) and known.max() < tokenizer.vocab_size
    assert unknown.sum() == gaps if gaps and not packing else unknown[-1]

WORDS = ["", "0", "-1", "1.5", "nan", "inf", "1e309", "9" * 30, "9" * 5000, "abc", "\udc80", "a\nb",
         "/", "..", "--", "[MASK]", "a" * 300, "0x10", "1_0", "a.txt", "none", "%s", "_"]
SLOW = "run_dir", "data_dir", "tokenizer", "sample", "compile"  # downloads or long trainings

@st.composite
def flags(draw):
    """Up to three flags; about half of the values have the right type."""
    argv = []
    safe = [f for f in fields(distill.Config) if f.name not in SLOW]
    for f in draw(st.lists(st.sampled_from(safe), min_size=1, max_size=3)):
        flag = flm.flag(f.name)
        if f.type in (bool, bool | None):
            argv.append(draw(st.sampled_from([flag, flag.replace("--", "--no-")])))
        else:
            good = f.metadata["choices"] or ["1", "2", "0.5", "a.txt"]
            argv += [flag, draw(st.sampled_from(good) | st.sampled_from(WORDS))]
    return argv

COMMANDS = [(flm, FLOW), (distill, MAP), (baselines, MAP), *((p, SAMPLE) for p in PROGRAMS)]

@fuzz(max_examples=150)
@given(flags(), st.sampled_from(COMMANDS))
@example(["--beta2", "1"], (flm, FLOW))
@example(["--dataset", "a\nb"], (flm, FLOW))
@example(["--run-dir", "a" * 300], (flm, FLOW))
def test_command_lines(argv, command):
    program, start = command
    attempt(program, [*start.split(), "--overwrite", *argv])
    shutil.copytree("good", "r", dirs_exist_ok=True)

@pytest.mark.parametrize("program, start, flags, message, remedies", [
    (flm, FLOW, "", "exists", ["--resume", "--overwrite", "--run-dir q"]),
    (flm, FLOW, "--run-dir a.txt/r", "use another one", ["--run-dir q"]),
    (flm, FLOW, "--resume --dataset other.txt", "another text; pass its text", ["--resume"]),
    (flm, NEW, "--heads 3", r"--width 8: must be a multiple of 2 \* --heads", ["--heads 4"]),
    (flm, NEW, "--seq-len 2", "larger one or --packing", ["--seq-len 2 --packing"]),
    (flm, NEW, "--packing --seq-len 9999", "use a smaller one", ["--packing --seq-len 99"]),
    (flm, NEW, "--tokenizer bpe --vocab-size 1", "at least 257", ["--tokenizer bpe"]),
    (flm, NEW, "--prompt a", "only with --sample; add it", ["--prompt a --sample --run-dir r"]),
    (flm, SAMPLE, "--prompt aaaaaaaaaaaaaa", "11 fit; shorten it", ["--prompt aaaaaaaaaaa"]),
    (flm, SAMPLE, "--prompt a?b", "remove it", ["--prompt a_b"]),
    (distill, SAMPLE, "--prompt a --sample-steps 1", "--sample-steps 2 or more", ["--prompt a"]),
    (distill, MAP, "--resume --dataset other.txt", "pass that text", ["--resume"]),
    (baselines, SAMPLE, "--model ar --prompt a_a", "remove them", ["--model ar --prompt aa"]),
])
def test_the_remedies_of_messages_work(program, start, flags, message, remedies):
    assert re.search(message, attempt(program, f"{start} {flags}"))
    for remedy in remedies:
        assert not attempt(program, f"{start} {remedy}")
