"""Texts, and mistakes on the command line: one line on stderr, whose remedy works."""

import re
import shutil
from pathlib import Path

import pytest
from nursery import attempt

import data
import distill
import flm
from extras import baselines
from test_flm import TEXT, TINY

FLOW = f"{TINY} --width 8 --max-steps 1 --sample-steps 2 --run-dir r"
NEW = f"{FLOW} --run-dir q"
MAP = "--run-dir r --device cpu --max-steps 1"
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

@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_token_files_decode_to_the_documents_of_a_text(kind, packing):
    """Line ends, blank lines, a byte order mark, combined and foreign characters, a long line."""
    shutil.rmtree("data", ignore_errors=True)
    documents = ["a b", "e\u0301 \u05e9\u05dc", "a\u2028b\x85c\x0cd", "\x01", *map(str, range(60))]
    text = "\ufeff" + "\r\n \t\n\n".join(documents)
    long = "".join(map(str, range(1000)))
    Path("c.txt").write_bytes(f"{text}\n{long}".encode())
    corpus = data.prepare("c.txt", kind, 2 if packing else 32, packing, 280)
    decoded = "\n".join(map(corpus.tokenizer.decode, corpus.splits.values())).split("\n")
    expected = documents + [long] * packing  # a padded row has no room for the long line
    assert sorted(filter(None, decoded)) == sorted(expected)
    assert corpus.meta["skipped"] == 1 - packing

@pytest.mark.parametrize("program, start, flags, message, remedies", [
    (flm, FLOW, "", "exists", ["--resume", "--overwrite", "--run-dir q"]),
    (flm, FLOW, "--run-dir a.txt/r", "use another one", ["--run-dir q"]),
    (flm, FLOW, "--resume --dataset other.txt", "of another text; pass that text", ["--resume"]),
    (flm, NEW, "--dataset 'a\nb'", "not found; use a path", ["--dataset a.txt"]),
    (flm, NEW, f"--run-dir {'a' * 300}", "use another one", ["--run-dir q"]),
    (flm, NEW, "--heads 3", r"--width 8: must be a multiple of 2 \* --heads", ["--heads 4"]),
    (flm, NEW, "--seq-len 2", "larger one or --packing", ["--seq-len 2 --packing"]),
    (flm, NEW, "--packing --seq-len 9999", "smaller than 9999", ["--packing --seq-len 99"]),
    (flm, NEW, "--prompt a", "only with --sample; add it", ["--prompt a --sample --run-dir r"]),
    (flm, SAMPLE, "--prompt aaaaaaaaaaaaaa", "11 fit; shorten it", ["--prompt aaaaaaaaaaa"]),
    (flm, SAMPLE, "--prompt a?b", "remove it", ["--prompt a_b"]),
    (distill, MAP, "--resume --dataset other.txt", "pass that text", ["--resume"]),
    (baselines, SAMPLE, "--model ar --prompt a_a", "remove them", ["--model ar --prompt aa"]),
])
def test_the_remedies_of_messages_work(program, start, flags, message, remedies):
    assert re.search(message, attempt(program, f"{start} {flags}"))
    for remedy in remedies:
        assert not attempt(program, f"{start} {remedy}")
