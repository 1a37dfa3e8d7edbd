"""Converts text to batches of token ids: corpora, tokenizers and memory-mapped token files.

    corpus = prepare("sentences", tokenizer="bpe", vocab_size=4096, seq_len=18, packing=False)
    corpus.batch("train", rows=range(64))      # (64, 18) token ids, a pure function of the rows

A corpus is a text of corpora/, a UTF-8 text file with one document per line (.txt, .gz, .xz), lm1b
or owt. It is tokenised once into data/NAME-KEY/. KEY is a hash of the text and of all settings.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import socket
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

CORPORA = Path(__file__).parent / "corpora"
EMBEDDED = ("sentences", "words", "sotu")
DATASETS = (*EMBEDDED, "lm1b", "owt")
FRAMED = ("gpt2", "bert-base-uncased")  # their packed rows are [begin] + L-2 tokens + [end]
TOKENIZERS = ("chars", "bpe", *FRAMED)
HELD_OUT = 20  # one line in 20 is held out if a corpus has no split of its own
BPE_CHARACTERS = 2**23  # a bpe vocabulary is trained on at most this much text
LM1B_URL = ("http://www.statmt.org/lm-benchmark/"
            "1-billion-word-language-modeling-benchmark-r13output.tar.gz")
LM1B_DOCUMENTS = 30_607_716
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
BERT_URL = "https://huggingface.co/bert-base-uncased/resolve/main/tokenizer.json"
OWT_REPOSITORY, OWT_DOCUMENTS = "Skylion007/openwebtext", 8_013_769

class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and a fix."""

    def __str__(self):
        return super().__str__().replace("\n", "\\n")

# ------------------------------------------------------------------------------------- corpora
@dataclass
class Source:
    """A corpus before tokenisation.

    Each call of read() yields the same pairs (split, texts), with about 1 MiB of documents each.
    split is "train" or "heldout", or None if the corpus has no split of its own.
    """

    name: str
    checksum: str  # identifies the text
    read: Callable
    documents: int | None = None  # for the progress bar

def find_source(dataset, data_dir=""):
    """The Source of `dataset`. A download starts only when it is read. Raises UserError."""
    if data_dir and dataset not in ("lm1b", "owt"):
        raise UserError(f"--data-dir {data_dir}: only for lm1b and owt; pass a file as --dataset")
    if data_dir and not os.path.exists(data_dir):
        raise UserError(f"--data-dir {data_dir}: no such file or folder; check the path")
    if dataset == "lm1b":
        return lm1b(data_dir)
    if dataset == "owt":
        return owt(data_dir)
    path = CORPORA / f"{dataset}.txt.xz" if dataset in EMBEDDED else Path(dataset)
    if not os.path.isfile(path):
        raise UserError(f"--dataset {dataset}: no such file; use one of {', '.join(DATASETS)} "
                        "or a text file")
    name = path.name.split(".")[0][:64] or "text"
    return Source(name, checksum(path), lambda: read_text(path))

@contextlib.contextmanager
def readable(name, fix="replace the file"):
    """Turns any error of reading a file or a download into a UserError that contains `name`."""
    try:
        yield
    except Exception as error:  # each format raises its own kinds
        if isinstance(error, UnicodeError):
            fix = "convert it to UTF-8"
        raise UserError(f"{name}: cannot be read ({first_line(error)}); {fix}") from None

def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

def read_lines(file):
    """Yields the non-blank lines of a UTF-8 file in lists of about 1 MiB."""
    text = TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    while lines := text.readlines(2**20):
        yield [line.rstrip("\r\n") for line in lines if not line.isspace()]

def read_text(path):
    """Yields (None, lines) of a .txt, .gz or .xz file, about 1 MiB at a time."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with readable(path), opener(path, "rb") as file:
        for lines in read_lines(file):
            yield None, lines

# The One Billion Word benchmark (Chelba et al. 2014): one tokenised news sentence per line.

LM1B_SPLITS = {"train": re.compile(r"training-monolingual.*/news\.en-\d{5}-of-00100$"),
               "heldout": re.compile(r"heldout-monolingual.*/news\.en\.heldout-\d{5}-of-00050$")}
DETOKENISE = [(re.compile(pattern), replacement) for pattern, replacement in (
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

def detokenise(texts):
    """Undoes the tokenisation of punctuation in lm1b."""
    text = "\n".join(texts)
    for pattern, replacement in DETOKENISE:
        text = pattern.sub(replacement, text)
    return text.split("\n") if texts else []

def lm1b(data_dir):
    """The Source of the published tarball: downloaded on first use, or local (file or folder)."""
    path = Path(data_dir or "data/lm1b")
    if path.is_dir() or not data_dir:
        path = path / LM1B_URL.split("/")[-1]
    if data_dir and not path.is_file():
        raise UserError(f"--data-dir {data_dir}: contains no {path.name}; download it")
    identity = f"{path.name} {path.stat().st_size}" if data_dir else LM1B_SHA256
    return Source("lm1b", identity, lambda: read_lm1b(path), LM1B_DOCUMENTS)

def read_lm1b(path):
    """Yields (split, texts) of the tarball, read as a stream without unpacking it to disk."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print("downloading and tokenising lm1b (1.8 GB); this takes a long time", file=sys.stderr)
        with readable("--dataset lm1b", "check the network, or pass a copy as --data-dir"):
            torch.hub.download_url_to_file(LM1B_URL, path, hash_prefix=LM1B_SHA256)
    found = set()
    with readable(path), gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked) as tar:
        for member in tar:
            for split, regex in LM1B_SPLITS.items():
                if regex.search(member.name):
                    found.add(split)
                    for lines in read_lines(tar.extractfile(member)):
                        yield split, detokenise(lines)
        unpacked.read()  # to the end, where gzip verifies its checksum
    if found != LM1B_SPLITS.keys():
        raise UserError(f"{path}: not the lm1b tarball; delete it, or pass another --data-dir")

# OpenWebText (Gokaslan and Cohen 2019): 8 million web pages as parquet files.

def owt(data_dir):
    """The Source of OpenWebText: the Hugging Face hub, or a folder of parquet or text files."""
    if not data_dir:
        return Source("owt", OWT_REPOSITORY, lambda: hold_out_last(download_owt()), OWT_DOCUMENTS)
    files = sorted(path for path in Path(data_dir).rglob("*")
                   if path.suffix in (".parquet", ".txt", ".gz", ".xz"))
    if not files:
        raise UserError(f"--data-dir {data_dir}: contains no .parquet, .txt, .gz or .xz file")
    listing = " ".join(f"{path.name} {path.stat().st_size}" for path in files)
    return Source("owt", listing, lambda: hold_out_last(files))

def download_owt():
    """The paths of the parquet files, which are downloaded on first use."""
    import huggingface_hub

    print("downloading and tokenising owt (24 GB); this takes a long time", file=sys.stderr)
    with readable("--dataset owt", "check the network, or pass a copy as --data-dir"):
        folder = huggingface_hub.snapshot_download(
            OWT_REPOSITORY, repo_type="dataset", allow_patterns="*.parquet")
    return sorted(Path(folder).rglob("*.parquet"))

def read_parquet(path):
    """Yields (None, texts) of the column `text`, 256 documents at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("--dataset owt: parquet files need pyarrow; pip install pyarrow") from None
    with readable(path), pyarrow.parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise UserError(f"{path}: has no column `text`; rename the column of the texts")
        for batch in file.iter_batches(256, columns=["text"]):
            texts = batch.column(0).to_pylist()
            yield None, [text for text in texts if text and not text.isspace()]

def hold_out_last(files):
    """Yields (split, texts). The last documents are held out: 100,000, but at most one in 20."""
    def read():
        for path in files:
            yield from read_parquet(path) if path.suffix == ".parquet" else read_text(path)
    total = sum(len(texts) for _, texts in read())
    left = total - min(100_000, total // HELD_OUT)  # 100,000 as in the paper
    for _, texts in read():
        yield "train", texts[:left]
        yield "heldout", texts[left:]
        left = max(0, left - len(texts))

def read_split(source):
    """Yields (split, texts) of a source. If it has no split, a hash of each line selects one."""
    for split, texts in source.read():
        if split:
            yield split, texts
            continue
        parts = dict(train=[], heldout=[])
        for text in texts:
            held_out = zlib.crc32(text.encode()) % HELD_OUT == 0
            parts["heldout" if held_out else "train"].append(text)
        yield from parts.items()

# ---------------------------------------------------------------------------------- tokenizers
class Tokenizer:
    """Text <-> token ids. `end` ends a document; `begin` starts a packed row, or is None.

    content: plain values that rebuild the tokenizer. Checkpoints contain them.
        {"kind": "chars", "chars": str}, {"kind": "bpe" or "bert-base-uncased", "model": str},
        {"kind": "gpt2"}, or {"kind": "ids", "vocab_size": int} if only the size is known.
    """

    def __init__(self, content):
        self.content, self.kind, self.begin = content, content["kind"], None
        if self.kind == "ids":
            self.end, self.vocab_size = -1, int(content["vocab_size"])
        elif self.kind == "chars":
            self.ids = {char: i for i, char in enumerate(content["chars"], start=1)}
            self.end, self.vocab_size = 0, len(self.ids) + 1
        elif self.kind == "gpt2":
            import tiktoken

            with readable("--tokenizer gpt2", "check the network, or set TIKTOKEN_CACHE_DIR"):
                self.codec = tiktoken.get_encoding("gpt2")
            self.begin = self.end = self.codec.eot_token
            self.vocab_size = self.codec.n_vocab + 1  # the paper adds a padding token
        else:
            from tokenizers import Tokenizer as Codec

            self.codec = Codec.from_str(content["model"])
            self.codec.encode_special_tokens = True  # "[SEP]" in a text is not an end token
            self.end = self.vocab_size = self.codec.get_vocab_size()
            if self.kind == "bpe":
                self.vocab_size += 1
            else:
                self.begin, self.end = map(self.codec.token_to_id, ("[CLS]", "[SEP]"))

    def encode(self, texts):
        """A list of token ids for each text, without an end token. Raises UserError."""
        if self.kind == "ids":
            raise UserError("the tokenizer of this model is unknown; convert it with --dataset")
        if self.kind == "chars":
            try:
                return [[self.ids[char] for char in text] for text in texts]
            except KeyError as error:
                raise UserError(f"character {error} is not in the vocabulary; remove it") from None
        if self.kind != "gpt2":
            return [e.ids for e in self.codec.encode_batch_fast(texts, add_special_tokens=False)]
        # tiktoken's own batch call starts one task per text, which is slower on short texts
        size = max(1, -(-len(texts) // os.cpu_count()))
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        with ThreadPoolExecutor() as pool:
            encoded = pool.map(lambda part: list(map(self.codec.encode_ordinary, part)), parts)
            return list(chain.from_iterable(encoded))

    def decode(self, ids):
        """The text of a row of ids. A begin or end token inside it becomes a line break."""
        lines = [[]]
        for i in map(int, ids):
            if i in (self.begin, self.end):
                lines.append([])
            else:
                lines[-1].append(i)
        return "\n".join(map(self.decode_line, lines)).strip("\n")

    def decode_line(self, ids):
        if self.kind == "ids":
            return " ".join(map(str, ids))
        if self.kind == "chars":
            return "".join(self.content["chars"][i - 1] for i in ids)
        if self.kind == "gpt2":
            ids = [i for i in ids if i < self.codec.n_vocab]
        return self.codec.decode(ids)

def make_tokenizer(kind, source, vocab_size):
    """A tokenizer for a corpus; bpe has at most `vocab_size` tokens, end token included."""
    if kind == "chars":
        characters = set(chain.from_iterable("".join(texts) for _, texts in source.read()))
        return Tokenizer({"kind": kind, "chars": "".join(sorted(characters))})
    if kind == "gpt2":
        return Tokenizer({"kind": kind})
    from tokenizers import Tokenizer as Codec
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "bert-base-uncased":
        with readable(f"--tokenizer {kind}", "check the network"):
            model = urllib.request.urlopen(BERT_URL).read().decode()
            return Tokenizer({"kind": kind, "model": model})
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: must be at least 257 (256 bytes and 1 end)")
    codec = Codec(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    codec.train_from_iterator(first_characters(source, BPE_CHARACTERS), trainer)
    if codec.get_vocab_size() + 1 < vocab_size:
        print(f"{source.name}: this text fills only {codec.get_vocab_size() + 1} of --vocab-size "
              f"{vocab_size} tokens", file=sys.stderr)
    return Tokenizer({"kind": kind, "model": codec.to_str()})

def first_characters(source, limit):
    """Training documents of about `limit` characters, or all documents if none is for training."""
    count = 0
    for split, texts in read_split(source):
        if split == "train":
            yield from texts
            count += sum(map(len, texts))
            if count >= limit:
                return
    if not count:
        yield from chain.from_iterable(texts for _, texts in source.read())

# --------------------------------------------------------------------------------- token files
@dataclass
class Corpus:
    """Tokenised text, memory-mapped: `splits` maps "train" and "heldout" to flat arrays of ids."""

    tokenizer: Tokenizer
    splits: dict[str, np.ndarray]
    meta: dict  # the content of meta.json
    seq_len: int
    packing: bool

    def describe(self):
        """Sizes, in one line."""
        counts = [f"{self.rows(split):,} {name} rows"
                  for split, name in (("train", "training"), ("heldout", "held-out"))]
        if self.splits["heldout"] is self.splits["train"]:
            counts[1] = "no row is held out: the training rows are also used for evaluation"
        if skipped := self.meta["skipped"]:
            counts.append(f"skipped {skipped:,} documents that do not fit in a row")
        return ", ".join([*counts, f"L = {self.seq_len}, V = {self.tokenizer.vocab_size}"])

    @property
    def frame(self):
        """1 if packed rows have a begin and an end token of their own, else 0."""
        return int(self.packing and self.tokenizer.begin is not None)

    def rows(self, split):
        """The number of rows of L tokens in a split."""
        return len(self.splits[split]) // (self.seq_len - 2 * self.frame)

    def batch(self, split, rows, seed=0):
        """Tokens (B, L), int64, of the given row numbers; a pure function of its arguments.

        Row numbers may exceed the size of the split. Every pass through the rows has a new random
        order, which depends on the seed. In training, it also cuts packed text at a new offset.
        """
        tokens, n, L = self.splits[split], self.rows(split), self.seq_len - 2 * self.frame
        row = np.asarray(rows)
        start = np.empty_like(row)
        for epoch in np.unique(row // n):
            order, offset = shuffle(seed, int(epoch), n)
            here = row // n == epoch
            start[here] = order[row[here] % n] * L
            if self.packing and split == "train":
                start[here] += offset % L
        index = (start[:, None] + np.arange(L)) % len(tokens)  # wraps around at the end
        ids = np.full((len(row), self.seq_len), self.tokenizer.end)
        ids[:, self.frame : self.seq_len - self.frame] = tokens[index]
        if self.frame:
            ids[:, 0] = self.tokenizer.begin
        return torch.from_numpy(ids)

@functools.lru_cache(maxsize=2)
def shuffle(seed, epoch, n):
    """The order of an epoch's n rows, and the offset of its first row."""
    random = np.random.default_rng([seed, epoch])
    return random.permutation(n), int(random.integers(2**62))

def prepare(dataset, tokenizer, seq_len, packing, vocab_size=0, data_dir="", cache="data"):
    """The Corpus of these settings: tokenised, or from the token files of an earlier call.

    packing: joins documents with end tokens and cuts rows of seq_len tokens. Otherwise, a row is
    one document, padded with at least one end token; longer ones are skipped. Raises UserError.
    """
    from filelock import FileLock

    socket.setdefaulttimeout(20)  # seconds, for servers that do not answer
    if packing and tokenizer in FRAMED and seq_len < 3:
        raise UserError(f"--seq-len {seq_len}: rows of {tokenizer} need at least 3 tokens")
    source = find_source(dataset, data_dir)
    settings = dict(source=source.checksum, tokenizer=tokenizer, packing=packing, format=7,
                    vocab_size=vocab_size if tokenizer == "bpe" else None,
                    seq_len=None if packing else seq_len)
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = Path(cache, f"{source.name}-{key}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                write_corpus(folder, source, settings)
    except OSError as error:  # errors of reading are UserErrors
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); make room, or start "
                        "in another folder") from None
    with readable(folder, "delete the folder"):
        meta = json.loads((folder / "meta.json").read_text())
        codec = Tokenizer(meta["tokenizer_content"])
        splits = {}
        for split, count in meta["tokens"].items():
            path, kind = folder / f"{split}.bin", token_type(codec)
            if path.stat().st_size != count * np.dtype(kind).itemsize:
                raise ValueError(f"{path.name} has another size")
            if count:
                splits[split] = np.memmap(path, kind, mode="r")
    corpus = Corpus(codec, splits, meta, seq_len, packing)
    usable = [split for split in splits if corpus.rows(split)]
    if not usable:
        raise UserError(f"{dataset}: shorter than a row of --seq-len {seq_len}; use a smaller one"
                        if packing else f"{dataset}: all documents have --seq-len {seq_len} or "
                        "more tokens; use a larger one or --packing")
    for split in ("train", "heldout"):  # a tiny corpus has one split, used for both
        if split not in usable:
            splits[split] = splits[usable[0]]
    return corpus

def write_corpus(folder, source, settings):
    """Writes tokenizer, token files and meta.json to a temporary folder, then renames it."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        codec = make_tokenizer(settings["tokenizer"], source, settings["vocab_size"])
        meta = settings | write_tokens(part, source, codec, settings["seq_len"])
        meta["tokenizer_content"] = codec.content
        (part / "meta.json").write_text(json.dumps(meta))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

def write_tokens(folder, source, tokenizer, seq_len):
    """Tokenises a source into folder/{train,heldout}.bin; returns counts for meta.json.

    seq_len: pads documents to this length, skips those that do not fit; None: neither.
    """
    tokens, skipped, end = dict(train=0, heldout=0), 0, [tokenizer.end]
    bar = tqdm(total=source.documents, desc=f"tokenising {source.name}", unit=" documents",
               unit_scale=True, file=sys.stderr, mininterval=1)
    with bar, open(folder / "train.bin", "wb") as train, open(folder / "heldout.bin", "wb") as held:
        for split, texts in read_split(source):
            documents = tokenizer.encode(texts)
            if seq_len:
                fitting = [ids for ids in documents if len(ids) < seq_len]
                skipped += len(documents) - len(fitting)
                documents = [ids + end * (seq_len - len(ids) - 1) for ids in fitting]
            flat = chain.from_iterable(ids + end for ids in documents)
            flat = np.fromiter(flat, token_type(tokenizer))
            (train if split == "train" else held).write(flat.tobytes())
            tokens[split] += len(flat)
            bar.update(len(texts))
    if not sum(tokens.values()) + skipped:
        raise UserError(f"{source.name}: the text is empty; pass one document per line")
    return dict(tokens=tokens, skipped=skipped)

def token_type(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

def checksum(path):
    with readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
