"""Texts as people have them: formats, compressions, line ends, and texts of unusual shapes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import flm
from data import UserError

STORIES = [f"Tom {i} had a cat.\n\nThe cat ran \"away\",\tto a tree.\nTom {i} cried."
           for i in range(99)]

def prepare(path, tokenizer="chars", packing=True):
    return data.prepare(str(path), tokenizer, 32, packing, 300)

def documents(corpus):
    """The documents of a packed corpus, sorted. Both splits may be the same."""
    found, end = [], corpus.tokenizer.end
    for ids in {id(split): split for split in corpus.splits.values()}.values():
        ends = [i for i, token in enumerate(ids) if token == end]
        found += [corpus.tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends], ends)]
    return sorted(found)

def message_of(path):
    message = str(pytest.raises(UserError, prepare, path).value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message

def as_csv(delimiter, field="text"):
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([["id", field], *enumerate(STORIES), [100, ""]])
    return file.getvalue()

def as_json(field="text"):
    return "".join(json.dumps({"id": i, field: story}) + "\n" for i, story in enumerate(STORIES))

SEPARATED = "\n<|endoftext|>\n".join(STORIES)

@pytest.mark.parametrize("name, content", [
    ("stories.txt", SEPARATED), ("windows.txt", SEPARATED.replace("\n", "\r\n")),
    ("joined.txt", "<|endoftext|>".join(STORIES)),
    ("rows.jsonl", as_json()), ("rows.json", as_json()), ("rows.csv", as_csv(",")),
    ("rows.tsv", as_csv("\t"))])
@pytest.mark.parametrize("pack, suffix", [
    (bytes, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz"), (bz2.compress, ".bz2"),
    (gzip.compress, "")])
def test_texts_of_several_lines(folder, name, content, pack, suffix):
    """A document per story; the separator is no text. The content shows the compression."""
    path = Path(name + suffix)
    path.write_bytes(pack(content.encode()))
    assert documents(prepare(path)) == sorted(STORIES)

def test_parquet_and_folders(folder):
    """The files of a folder are read in sorted order; others in it are not read."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": [1] * 9, "text": STORIES[:9]}), "c.parquet", row_group_size=4)
    assert documents(prepare("c.parquet")) == sorted(STORIES[:9])
    Path("all/b").mkdir(parents=True)
    Path("c.parquet").rename("all/c.parquet")
    Path("all/b/b.jsonl").write_text(as_json())
    Path("all/a.txt").write_text("first\nsecond")
    Path("all/README.md").write_text("not this")
    read = [text for _, texts in data.find_source("all").read() for text in texts]
    assert read == ["first", "second", *STORIES, *STORIES[:9]]
    Path("none").mkdir()
    assert "contains no .txt" in message_of("none")

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", as_json("body")), ("a.csv", as_csv(",", "body")), ("a.tsv", as_csv("\t", "body"))])
def test_another_field_is_named(folder, name, content):
    Path(name).write_text(content)
    assert "no field `text`; rename one of: id, body" in message_of(name)

@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text": "a"}\n{"text": {"b": "c"}}', "must be text, not {'b': 'c'}"),
    ("a.json", '[{"text": "a"}]', "one JSON object per line"),
    ("a.json", '[\n{"text": "a"}\n]', "cannot be read"),
    ("a.csv", "text\nHello, world", "rows longer than its header; quote"),
    ("a.csv", "id,text\n1,\"open\n2,b\n", "cannot be read (unexpected end of data)"),
    ("a.tsv", 'id\ttext\n1\t"Hi", he\n2\tb', "cannot be read")])
def test_a_table_that_is_none_is_one_line(folder, name, content, message):
    Path(name).write_text(content)
    assert message in message_of(name)

def test_values_of_a_table(folder):
    """Null is no document; half a surrogate pair becomes a question mark; suffixes in any case."""
    Path("a.JSONL").write_text('{"text": "a\\ud83db"}\n{"text": null}\n\n{"text": ""}')
    assert [texts for _, texts in data.find_source("a.JSONL").read()] == [["a?b"]]

@pytest.mark.parametrize("content, position", [
    (b"abc\n" * 10**6 + b"d\0e", 4_000_001), ("é\n".encode() + b"\xff\xfe", 3), (b"\0", 0),
    (b"\x89PNG\r\n\x1a\n", 0)])
def test_binary_files_are_refused_at_a_byte(folder, content, position):
    Path("a.txt").write_bytes(content)
    assert f"is not UTF-8 text at byte {position};" in message_of("a.txt")

def test_archives_are_refused_with_the_command_that_unpacks_them(folder):
    Path("a.txt").write_text("text\n" * 99)
    with zipfile.ZipFile("b.txt", "w") as file:
        file.write("a.txt")
    assert message_of("b.txt").endswith("unpack it: unzip b.txt")
    for mode in ("w", "w:gz"):
        with tarfile.open("b.txt", mode) as file:
            file.add("a.txt")
        assert message_of("b.txt").endswith("unpack it: tar -xf b.txt")
    Path("b.txt").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(99)))
    assert message_of("b.txt").endswith("unpack it: zstd -d --rm b.txt")

def test_lines_end_at_lf_cr_lf_or_cr_and_a_printed_text_is_one_line(folder):
    lines = ["a\x0bb", "c\x0cd", "e\x85f", "g\u2028h", "i\x1b[31mj", "k\u202el", "m\u00e9\u732b"]
    Path("a.txt").write_bytes("{}\n{}\r\n{}\r{}\r\r{}\n\n{}\r\n\r\n{}".format(*lines).encode())
    corpus = prepare("a.txt")
    assert documents(corpus) == sorted(lines)
    model = SimpleNamespace(tokenizer=corpus.tokenizer, config=corpus)
    text = "\n".join(lines)
    tokens = [corpus.tokenizer.encode([line])[0] + [0] for line in lines]
    (shown,) = flm.to_lines(model, torch.tensor([sum(tokens, [])]))
    assert shown.isprintable()
    assert shown == text.encode("unicode_escape").decode().replace("\\xe9\\u732b", "\u00e9\u732b")

@pytest.mark.parametrize("tokenizer", ["chars", "bpe"])
def test_one_long_line_as_in_text8(folder, tokenizer):
    """The end of the line is held out. Pieces are cut where the tokenizer splits words anyway."""
    words = random.Random(0).choices(["the", "of", "one", "zero", "anarchism"], k=20_000)
    text = " ".join(words)
    Path("text8").write_text(text)
    corpus = prepare("text8", tokenizer)
    cut = len(text) - len(text) // 20
    for split, expected in (("train", text[:cut]), ("heldout", text[cut:])):
        ids = corpus.splits[split]
        assert corpus.tokenizer.decode(ids) == expected
        assert list(ids) == [*corpus.tokenizer.encode([expected])[0], corpus.tokenizer.end]

@pytest.mark.parametrize("tokenizer, packing", [("chars", True), ("bpe", True), ("bpe", False)])
def test_a_word_of_any_length_takes_seconds(folder, tokenizer, packing):
    dna = "".join(random.Random(0).choices("ACGT", k=400_000))
    Path("dna.txt").write_text(f"{dna}\nACGT\nTTT")
    start = time.monotonic()
    corpus = prepare("dna.txt", tokenizer, packing)
    assert time.monotonic() - start < 60
    assert corpus.meta["skipped"] == 1 - packing

@pytest.mark.parametrize("text", ["one document of one row, no more", "a b c\nd e f\ng h i",
                                  "\n".join(["the same"] * 10)])
def test_tiny_texts_are_as_they_are(folder, text):
    """The end of a document is held out only if that leaves rows to evaluate."""
    Path("tiny.txt").write_text(text)
    assert documents(data.prepare("tiny.txt", "chars", 8, True)) == sorted(text.split("\n"))
