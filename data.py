"""Converts text to batches of token ids: corpora, tokenizers and memory-mapped token files.

    corpus = prepare("sentences", tokenizer="bpe", vocab_size=4096, seq_len=18, packing=False)
    corpus.batch("train", rows=range(64))      # (64, 18) token ids, a pure function of the rows

A corpus is a text of corpora/, lm1b, owt, or your file or folder: plain text, JSON lines, CSV or
Parquet. It is tokenised once into data/NAME-KEY/. KEY is a hash of the text and of all settings.
"""

import bz2
import contextlib
import csv
import functools
import gzip
import hashlib
import io
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
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

CORPORA = Path(__file__).parent / "corpora"
EMBEDDED = ("sentences", "words", "sotu")
DATASETS = (*EMBEDDED, "lm1b", "owt")
FRAMED = ("gpt2", "bert-base-uncased")  # their packed rows are [begin] + L-2 tokens + [end]
TOKENIZERS = ("chars", "bpe", *FRAMED)
HELD_OUT = 20  # one document in 20, or 1/20 of each, is held out if a corpus has no split
SEPARATOR = "<|endoftext|>"  # between documents of several lines
PIECE = 2**14  # characters that a tokenizer reads at once, as bpe training is slow for long words
BPE_CHARACTERS = 2**23  # a bpe vocabulary is trained on at most this much text
LM1B_URL = ("http://www.statmt.org/lm-benchmark/"
            "1-billion-word-language-modeling-benchmark-r13output.tar.gz")
LM1B_SHA256 = "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
BERT_URL = "https://huggingface.co/bert-base-uncased/resolve/main/tokenizer.json"
OWT_REPOSITORY = "Skylion007/openwebtext"

class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and a fix."""

    def __str__(self):
        return printable(super().__str__())[:500]

def printable(text):
    """The text in one line: line breaks and other invisible characters are escaped, as in \\n."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)

# ------------------------------------------------------------------------------------- corpora
@dataclass
class Source:
    """A corpus before tokenisation. Each call of read() yields the same pairs (split, texts). texts
    are some documents; split is "train", "heldout", or None if the corpus has no split."""

    name: str
    checksum: str  # of the text; of file names and sizes for a local lm1b or owt
    read: Callable
    ends: bool = False  # hold out the end of each document

def find_source(dataset, data_dir=""):
    """The Source of `dataset`. A download starts only when it is read. Raises UserError."""
    if data_dir and (dataset not in ("lm1b", "owt") or not os.path.exists(data_dir)):
        raise UserError(f"--data-dir {data_dir}: no copy of lm1b or owt; use --dataset PATH")
    if dataset in ("lm1b", "owt"):
        return lm1b(data_dir) if dataset == "lm1b" else owt(data_dir)
    path = CORPORA / f"{dataset}.txt.xz" if dataset in EMBEDDED else Path(dataset)
    if not dataset or not path.exists():
        raise UserError(f"--dataset {dataset}: not found; use a path or {', '.join(DATASETS)}")
    files = files_of(path)
    name = printable(path.name.split(".")[0])[:64] or "text"
    return Source(name, " ".join(map(checksum, files)), lambda: read_all(files))

def files_of(path):
    """The file, or those files of a folder that have a known suffix. Raises UserError."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and suffix(file))
    if not files:
        raise UserError(f"{path}: contains no .txt, .json(l), .csv, .tsv or .parquet file; add one")
    return files

def suffix(path):
    """txt, json, jsonl, csv, tsv, parquet or None; not the suffix of a compression."""
    found = re.search(r"\.(txt|jsonl?|csv|tsv|parquet)(\.(gz|xz|bz2|zst))?$", path.name.lower())
    return found and found[1]

def checksum(path):
    with readable(path, "check the file and its permissions"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@contextlib.contextmanager
def readable(name, fix="replace the file"):
    """Turns any error of reading a file or a download into a UserError that contains `name`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each format raises its own kinds
        raise UserError(f"{name}: cannot be read ({error!s:.200}); {fix}") from None

def read_all(files):
    """Yields (None, documents) of files, 1 MiB or 256 rows at once. Blank ones are omitted."""
    for path in files:
        read = read_plain if suffix(path) in ("txt", None) else read_table
        with readable(path, "check its format"), open_file(path) as file:
            for texts in read(file, path):
                yield None, [text for text in texts if text and not text.isspace()]

OPENERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
ARCHIVES = {b"\x28\xb5\x2f\xfd": "zstd -d --rm", b"PK\x03\x04": "unzip", b"ustar": "tar -xf"}

def open_file(path):
    """Opens a file, which gzip, xz or bz2 may have compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), open)
    return opener(path, "rb")

def read_blocks(file, path):
    """Yields a UTF-8 file as strings of about 1 MiB, cut after a line. Line ends become \\n."""
    position = 0
    while lines := file.readlines(2**20):
        block = b"".join(lines)
        bad = block.find(0)
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            bad = error.start
        if bad >= 0:
            commands = [ARCHIVES[magic] for magic in ARCHIVES if magic in block[:262]]
            fix = f"unpack it: {commands[0]}" if commands else "convert it to UTF-8: iconv -f NAME"
            raise UserError(f"{path}: is not UTF-8 text at byte {position + bad}; {fix} {path}")
        position += len(block)
        yield text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")

def read_plain(file, path):
    """Yields lists of documents: lines, or what is between SEPARATORs if the first MiB has one."""
    separator, parts = None, []
    for block in read_blocks(file, path):
        separator = separator or (SEPARATOR if SEPARATOR in block else "\n")
        parts.append(block)
        if separator in block:
            *documents, rest = "".join(parts).split(separator)
            parts = [rest]
            yield [text.strip("\n") for text in documents if text.strip() != SEPARATOR]
    yield ["".join(parts).strip("\n")]

def read_table(file, path):
    """Yields lists of the field `text` of JSON lines, of CSV or TSV with a header, of Parquet."""
    kind, lines = suffix(path), chain.from_iterable(map(io.StringIO, read_blocks(file, path)))
    if kind == "parquet":
        with readable(path, "pip install pyarrow"):
            import pyarrow.parquet
        table = pyarrow.parquet.ParquetFile(file)
        columns = ["text"] if "text" in table.schema_arrow.names else None
        rows = chain.from_iterable(b.to_pylist() for b in table.iter_batches(256, columns=columns))
    elif kind in ("csv", "tsv"):
        csv.field_size_limit(2**31 - 1)
        rows = csv.DictReader(lines, delimiter="," if kind == "csv" else "\t", strict=True)
    else:
        rows = map(json.loads, filter(str.strip, lines))
    while part := list(islice(rows, 256)):
        for row in part:
            if not isinstance(row, dict):
                raise UserError(f"{path}: must have one JSON object per line: jq -c .[] FILE")
            if None in row:
                raise UserError(f"{path}: has rows longer than its header; quote texts with commas")
            if "text" not in row:
                raise UserError(f"{path}: has no field `text`; rename one of: {', '.join(row)}")
            if not isinstance(row["text"], str | None):
                raise UserError(f"{path}: the field `text` must be text, not {row['text']!r:.40}")
        yield [(row["text"] or "").encode(errors="replace").decode() for row in part]

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
    return text.split("\n") if text else []

def lm1b(data_dir):
    """The Source of the published tarball: downloaded on first use, or local (file or folder)."""
    path = Path(data_dir or "data/lm1b")
    if path.is_dir() or not data_dir:
        path = path / LM1B_URL.split("/")[-1]
    if data_dir and not path.is_file():
        raise UserError(f"--data-dir {data_dir}: contains no {path.name}; download it")
    identity = f"{path.name} {path.stat().st_size}" if data_dir else LM1B_SHA256
    return Source("lm1b", identity, lambda: read_lm1b(path))

def read_lm1b(path):
    """Yields (split, texts) of the tarball, read as a stream without unpacking it to disk."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with readable("--dataset lm1b", "check the network, or pass a copy as --data-dir"):
            torch.hub.download_url_to_file(LM1B_URL, path, hash_prefix=LM1B_SHA256)
    found = set()
    with readable(path), gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked) as tar:
        for member in tar:
            for split, regex in LM1B_SPLITS.items():
                if regex.search(member.name):
                    found.add(split)
                    for lines in read_plain(tar.extractfile(member), path):
                        yield split, detokenise(filter(str.strip, lines))
        unpacked.read()  # to the end, where gzip verifies its checksum
    if found != LM1B_SPLITS.keys():
        raise UserError(f"{path}: not the lm1b tarball; delete it, or pass another --data-dir")

def owt(data_dir):
    """The Source of OpenWebText (Gokaslan and Cohen 2019): the Hugging Face hub, or a folder."""
    files = files_of(Path(data_dir)) if data_dir else []
    text = " ".join(f"{path.name} {path.stat().st_size}" for path in files) or OWT_REPOSITORY
    return Source("owt", text, lambda: hold_out_last(files or download_owt()))

def download_owt():
    """The paths of the Parquet files, which are downloaded on first use."""
    import huggingface_hub
    with readable("--dataset owt", "check the network, or pass a copy as --data-dir"):
        folder = huggingface_hub.snapshot_download(
            OWT_REPOSITORY, repo_type="dataset", allow_patterns="*.parquet")
    return sorted(Path(folder).rglob("*.parquet"))

def hold_out_last(files):
    """Yields (split, texts). The last documents are held out: 100,000, but at most one in 20."""
    total = sum(len(texts) for _, texts in read_all(files))
    left = total - min(100_000, total // HELD_OUT)  # 100,000 as in the paper
    for _, texts in read_all(files):
        yield "train", texts[:left]
        yield "heldout", texts[left:]
        left = max(0, left - len(texts))

def training_part(text, ends):
    """How many characters of a document are not held out. ends: hold out the end of each one."""
    if ends:
        return len(text) - len(text) // HELD_OUT
    return 0 if zlib.crc32(text.encode()) % HELD_OUT == 0 else len(text)

def holds_out_ends(source):
    """Whether to hold out document ends: whole documents would be < 1 % or > 15 % of the text."""
    training = total = 0
    for split, texts in source.read():
        if split:
            return False
        total += sum(map(len, texts))
        training += sum(training_part(text, ends=False) for text in texts)
    return total >= 10_000 and not 0.85 <= training / total <= 0.99

def read_split(source):
    """Yields (split, texts) of a source, even if it has no split of its own."""
    for split, texts in source.read():
        if split:
            yield split, texts
            continue
        cuts = [training_part(text, source.ends) for text in texts]
        yield "train", [text[:cut] for text, cut in zip(texts, cuts) if cut]
        yield "heldout", [text[cut:] for text, cut in zip(texts, cuts) if text[cut:].strip()]

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
            self.end = self.vocab_size = self.codec.get_vocab_size()  # a new id, if bpe
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
        return self.codec.encode_ordinary_batch(texts)

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
    """A tokenizer of a kind, or of a content; bpe has at most vocab_size tokens, with the end."""
    if isinstance(kind, dict):
        return Tokenizer(kind)
    if kind == "chars":
        characters = set(chain.from_iterable("".join(texts) for _, texts in source.read()))
        return Tokenizer({"kind": kind, "chars": "".join(sorted(characters))})
    if kind == "gpt2":
        return Tokenizer({"kind": kind})
    from tokenizers import ByteLevelBPETokenizer
    if kind == "bert-base-uncased":
        with readable(f"--tokenizer {kind}", "check the network"):
            model = urllib.request.urlopen(BERT_URL).read().decode()
            return Tokenizer({"kind": kind, "model": model})
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: must be at least 257 (256 bytes and 1 end)")
    codec = ByteLevelBPETokenizer()
    codec.train_from_iterator(first_characters(source, BPE_CHARACTERS), vocab_size - 1,
                              min_frequency=0, show_progress=False)
    if codec.get_vocab_size() + 1 < vocab_size:
        print(f"{source.name}: this text fills only {codec.get_vocab_size() + 1} of --vocab-size "
              f"{vocab_size} tokens", file=sys.stderr)
    return Tokenizer({"kind": kind, "model": codec.to_str()})

def first_characters(source, limit):
    """Training documents of about `limit` characters, or all documents if none is for training."""
    count = 0
    for split, texts in read_split(source):
        if split == "train":
            for text in texts:
                yield from (piece for piece, _ in pieces(text[:limit]))
            count += sum(map(len, texts))
            if count >= limit:
                return
    if not count:
        yield from chain.from_iterable(texts for _, texts in source.read())

def pieces(text):
    """Yields pieces of a text, cut before spaces if possible, and whether each is the last one."""
    start = 0
    while len(text) - start > PIECE:
        space = text.rfind(" ", start + 1, start + PIECE)
        stop = space if space > 0 else start + PIECE
        yield text[start:stop], False
        start = stop
    yield text[start:], True

# --------------------------------------------------------------------------------- token files
@dataclass
class Corpus:
    """Tokenised text, memory-mapped: `splits` maps "train" and "heldout" to flat arrays of ids."""

    tokenizer: Tokenizer
    splits: dict[str, np.ndarray]
    meta: dict  # the content of meta.json
    seq_len: int
    packing: bool

    def describe(self):  # sizes, in one line
        counts = [f"{self.rows('train'):,} training rows", f"{self.rows('heldout'):,} held out"]
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

    tokenizer: a kind, or the content of a trained one. packing: joins documents with end tokens and
    cuts rows of seq_len tokens. Otherwise, a row is one document, padded with at least one end
    token; longer ones are skipped. Raises UserError.
    """
    from filelock import FileLock
    socket.setdefaulttimeout(20)  # seconds, for servers that do not answer
    if packing and tokenizer in FRAMED and seq_len < 3:
        raise UserError(f"--seq-len {seq_len}: rows of {tokenizer} need at least 3 tokens")
    source = find_source(dataset, data_dir)
    settings = dict(source=source.checksum, tokenizer=tokenizer, packing=packing, format=8,
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
        raise UserError(f"{folder}: cannot be written; mend this: {error!s:.200}") from None
    with readable(folder, "delete the folder"):
        meta = json.loads((folder / "meta.json").read_text())
        codec = Tokenizer(meta["tokenizer_content"])
        splits = {}
        for split, count in meta["tokens"].items():
            if count:
                path = folder / f"{split}.bin"
                splits[split] = np.memmap(path, token_type(codec), "r", shape=(count,))
    corpus = Corpus(codec, splits, meta, seq_len, packing)
    usable = [split for split in splits if corpus.rows(split)]
    if not usable:
        raise UserError(f"{dataset}: shorter than a row; use a --seq-len smaller than {seq_len}"
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
        source.ends = settings["packing"] and holds_out_ends(source)
        codec = make_tokenizer(settings["tokenizer"], source, settings["vocab_size"])
        meta = settings | write_tokens(part, source, codec, settings["seq_len"])
        meta["tokenizer_content"] = codec.content
        (part / "meta.json").write_text(json.dumps(meta))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

def write_tokens(folder, source, tokenizer, seq_len):
    """Tokenises a source into folder/{train,heldout}.bin; returns counts for meta.json. With
    seq_len, documents are padded to seq_len tokens; those without room for an end are skipped."""
    tokens, skipped, end = dict(train=0, heldout=0), 0, [tokenizer.end]
    bar = tqdm(desc=f"tokenising {source.name}", unit=" documents", unit_scale=True, disable=None)
    with bar, open(folder / "train.bin", "wb") as train, open(folder / "heldout.bin", "wb") as held:
        for split, texts in read_split(source):
            parts = [(text, True) for text in texts]
            if not seq_len:
                parts = list(chain.from_iterable(map(pieces, texts)))
            for i in range(0, len(parts), 1024):
                part, last = zip(*parts[i : i + 1024])  # last: a document ends here
                documents = tokenizer.encode(part)
                if seq_len:
                    fitting = [ids for ids in documents if len(ids) < seq_len]
                    skipped += len(documents) - len(fitting)
                    documents = [ids + end * (seq_len - len(ids) - 1) for ids in fitting]
                flat = chain.from_iterable(ids + end * x for ids, x in zip(documents, last))
                flat = np.fromiter(flat, token_type(tokenizer))
                (train if split == "train" else held).write(flat.tobytes())
                tokens[split] += len(flat)
            bar.update(len(texts))
    if not sum(tokens.values()) + skipped:
        raise UserError(f"{source.name}: the text is empty; pass another one")
    return dict(tokens=tokens, skipped=skipped)

def token_type(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
