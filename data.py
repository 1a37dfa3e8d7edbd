"""Text in, token files out: corpora, tokenizers, memory-mapped tokens, batches.

    corpus = data.prepare("words", tokenizer="chars", seq_len=16, packing=False, seed=0, batch_size=256)
    corpus.batch("train", step=0, rows=range(0, 256))        # (256, 16) token ids

A corpus is a UTF-8 text with one document a line (.txt, .txt.gz, .txt.xz), lm1b or owt (sources.py). Of a text one line in
twenty is held out, chosen by a hash of the line, so that it stays held out whatever else changes. Tokens are written once to
data/NAME-HASH/ and mapped from there; the hash covers the source's checksum and every setting, so a change of either makes
new files. A script of your own that prepares a large corpus does so under `if __name__ == "__main__":`.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import sources
from sources import Batch, Source, UserError

FRAMED = ("gpt2", "bert-base-uncased")  # the paper's: packed rows begin and end with a token of their own
TOKENIZERS = ("chars", "bpe", *FRAMED)
HELD_OUT = 20  # one line in this many, where a source has no split of its own
SAVE_EVERY = 64  # batches, of a MiB or so, that an interruption costs at most
LARGE = 2**24  # bytes of text from which on it is tokenised by one process a core
MOST_WORKERS = 8  # processes, of some 200 MiB each
VOCABULARY = 2**23  # characters of training text that a bpe vocabulary is made from, at most: they may need 2 GB
FORMAT = 4  # of the token files; part of their hash


def documents(source: Source) -> Iterator[Batch]:
    """The batches of a source as they are tokenised: detokenised, each with a split."""
    for batch in source.batches():
        yield from by_split(batch, source.detokenise)


def by_split(batch: Batch, detokenise: bool) -> list[Batch]:
    """A batch as one of its split, or as two: its training documents and those held out by their hash."""
    texts = batch.texts
    if detokenise and texts:
        texts = sources.detokenise("\n".join(texts)).split("\n")
    if batch.split:
        return [batch._replace(texts=texts)]
    out = [held_out(text) for text in texts]
    return [batch._replace(split=name, texts=[text for text, o in zip(texts, out) if o == is_out],
                           numbers=[i for i, o in zip(batch.numbers, out) if o == is_out])
            for name, is_out in (("train", False), ("heldout", True))]


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


# --------------------------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """Text <-> token ids, the id of the end token and, for the paper's two vocabularies, of the one that begins a row.

    `content` is what tokenizer.json holds, enough to rebuild it anywhere: {"kind": "chars", "chars": ...},
    {"kind": "bpe" | "bert-base-uncased", "model": ...} (a `tokenizers` model), {"kind": "gpt2"} (tiktoken's) or, where only
    their number is known, {"kind": "ids", "vocab_size": ...}.
    """

    def __init__(self, content: dict):
        self.content, self.kind, self.begin = content, content["kind"], None
        if self.kind == "ids":
            self.end, self.vocab_size = -1, int(content["vocab_size"])
        elif self.kind == "chars":  # ids 1.. in the order of `chars`; 0 ends a document
            if not isinstance(content["chars"], str):
                raise ValueError("its characters are no text")
            self.ids = {char: i for i, char in enumerate(content["chars"], start=1)}
            self.end, self.vocab_size = 0, len(self.ids) + 1
        elif self.kind == "gpt2":
            import tiktoken

            try:
                self.codec = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever its HTTP client raises
                raise UserError(f"--tokenizer gpt2: tiktoken could not download it ({type(error).__name__}); connect "
                                "once, or point TIKTOKEN_CACHE_DIR to a copy") from None
            self.begin = self.end = self.codec.eot_token
            self.vocab_size = self.codec.n_vocab + 1  # and the paper's token for padding, which no text has
        else:
            from tokenizers import Tokenizer as Codec

            self.codec = Codec.from_str(content["model"])
            self.codec.encode_special_tokens = True  # "[SEP]" in a text is five characters, not the end token
            size = self.codec.get_vocab_size()
            if self.kind == "bpe":
                self.end, self.vocab_size = size, size + 1
            else:
                self.begin, self.end = self.codec.token_to_id("[CLS]"), self.codec.token_to_id("[SEP]")
                self.vocab_size = size

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without an end token. Raises UserError for a character that `chars` does not have."""
        if self.kind == "chars":
            try:
                return [[self.ids[char] for char in text] for text in texts]
            except KeyError as error:
                raise UserError(f"the character {error} is not in the vocabulary of {len(self.ids)} characters") from None
        if self.kind == "gpt2":
            return [self.codec.encode_ordinary(text) for text in texts]  # its own batches are slower on short texts
        if self.kind == "ids":
            raise UserError("the vocabulary of this model is not known; convert it again with --dataset lm1b or owt")
        return [encoding.ids for encoding in self.codec.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of one row of ids; an end token is a line break, those at its ends are dropped."""
        if self.kind == "ids":
            return " ".join(map(str, map(int, ids)))
        pieces, piece = [], []
        for i in [*map(int, ids), self.end]:
            if i != self.end:
                piece.append(i)
            else:
                pieces.append(self._decode(piece))
                piece = []
        return "\n".join(pieces).strip("\n")

    def _decode(self, ids: list[int]) -> str:
        if self.kind == "chars":
            return "".join(self.content["chars"][i - 1] for i in ids)
        if self.kind == "gpt2":
            ids = [i for i in ids if i < self.end]
        return self.codec.decode(ids)

    @property
    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        sources.replace_file(path, json.dumps(self.content))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, and the run needs it; put it back, or train anew: python flm.py "
                            f"--run-dir {path.parent} --overwrite") from None
        except Exception as error:  # `tokenizers` raises bare Exception for a bad model
            raise UserError(f"{path}: not a tokenizer of this program ({type(error).__name__})") from None


def make_tokenizer(kind: str, source: Source, vocab_size: int) -> Tokenizer:
    """Builds the tokenizer `kind` for a corpus: `chars` from all its text, `bpe` from its training text, of which the first
    8 million characters are read.

    vocab_size counts the end token and is used by `bpe` alone. Raises UserError where the text cannot fill it.
    """
    if kind == "chars":
        chars = set()
        for batch in documents(source):
            chars.update(*batch.texts)
        return Tokenizer({"kind": kind, "chars": "".join(sorted(chars))})
    if kind == "gpt2":
        return Tokenizer({"kind": kind})
    from tokenizers import Tokenizer as Codec
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if kind == "bpe":
        codec = Codec(models.BPE())
        codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        codec.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        codec.train_from_iterator(first_characters(source, VOCABULARY), trainer)
        if codec.get_vocab_size() + 1 != vocab_size:
            raise UserError(f"--vocab-size {vocab_size}: this text gives {codec.get_vocab_size() + 1} tokens; give that "
                            "number, or use --tokenizer chars")
    else:
        try:
            codec = Codec.from_pretrained(kind)
        except Exception as error:  # whatever the hub's client raises
            raise UserError(f"--tokenizer {kind}: could not be downloaded ({type(error).__name__}); connect once") from None
    return Tokenizer({"kind": kind, "model": codec.to_str()})


def first_characters(source: Source, most: int) -> Iterator[str]:
    """The training documents of a source, until they have `most` characters."""
    for batch in documents(source):
        if batch.split == "train":
            yield from batch.texts
            if (most := most - sum(map(len, batch.texts))) <= 0:
                return


# ------------------------------------------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Tokenised text, mapped from disk: `splits` holds one flat array of ids for "train" and one for "heldout"."""

    tokenizer: Tokenizer
    splits: dict[str, np.ndarray]
    meta: dict  # vocabulary, counts, source checksum, split rule
    log_p: torch.Tensor  # (V,) log-frequencies of the training tokens, one added to each count
    seq_len: int
    packing: bool
    seed: int
    batch_size: int
    borrowed: bool  # whether one split was too short for a row, so that both are the other

    @property
    def frame(self) -> int:
        """1 where a row begins and ends with tokens of its own, as the paper's packed rows do, else 0."""
        return int(self.packing and self.tokenizer.begin is not None)

    def blocks(self, split: str) -> int:
        """How many sequences of L tokens the split has."""
        return len(self.splits[split]) // (self.seq_len - 2 * self.frame)

    def batch(self, split: str, step: int, rows: range) -> torch.Tensor:
        """Rows of the global batch of `step`: (len(rows), L) int64, a pure function of its arguments and the seed.

        Training goes through all blocks in a new order each epoch; packed text is also cut at a new place each epoch.
        The held-out split is read in order.
        """
        tokens, n, L = self.splits[split], self.blocks(split), self.seq_len - 2 * self.frame
        place = step * self.batch_size + np.asarray(rows)
        start = place % n * L
        if split == "train":
            for epoch in np.unique(place // n):
                here = place // n == epoch
                order, cut = shuffle(self.seed, int(epoch), n)
                start[here] = order[place[here] % n] * L + (cut % len(tokens) if self.packing else 0)
        index = (start[:, None] + np.arange(L)) % len(tokens)  # behind the end the text begins again
        ids = tokens[index].astype(np.int64)
        if ids.max(initial=0) >= self.tokenizer.vocab_size:
            raise UserError(f"{getattr(tokens, 'filename', split)}: damaged, it holds a token beyond the vocabulary; remove "
                            "its folder, and the next run makes it again")
        out = torch.from_numpy(ids)
        return F.pad(F.pad(out, (1, 0), value=self.tokenizer.begin), (0, 1), value=self.tokenizer.end) if self.frame else out


@functools.lru_cache(maxsize=2)
def shuffle(seed: int, epoch: int, n: int) -> tuple[np.ndarray, int]:
    """The order of an epoch's n blocks and the place of its first cut."""
    random = np.random.default_rng([seed, epoch])
    return random.permutation(n), int(random.integers(2**62))


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class Writer:
    """Appends tokens to folder/{train,heldout}.bin and remembers, in folder/counts.npz, how far it has come: after a kill
    the next one goes on from there, and the files come out the same."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder, self.dtype = folder, token_type(vocab_size)
        self.batches, self.counts = 0, np.zeros(vocab_size, np.int64)  # batches read, and how often each token was written
        self.tokens, self.documents = dict(train=0, heldout=0), dict(train=0, heldout=0)
        self.files = {split: open(folder / f"{split}.bin", "ab") for split in self.tokens}
        if (saved := read_counts(folder, vocab_size)) and all(
                file.tell() >= saved[split][0] * self.dtype().itemsize for split, file in self.files.items()):
            self.batches, self.counts = int(saved["batches"]), saved["counts"]
            for split in self.files:
                self.tokens[split], self.documents[split] = map(int, saved[split])
        for split, file in self.files.items():
            file.truncate(self.tokens[split] * self.dtype().itemsize)

    def add(self, parts: list[tuple[str, int, np.ndarray]]) -> None:
        """What one batch of the source has come to: for each split in it, how many documents, and their tokens."""
        for split, documents, ids in parts:
            self.files[split].write(ids.tobytes())
            self.tokens[split] += len(ids)
            self.documents[split] += documents
            if split == "train":
                self.counts += np.bincount(ids, minlength=len(self.counts))
        self.batches += 1
        if self.batches % SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        with open(self.folder / "counts.part", "wb") as file:
            np.savez(file, batches=self.batches, counts=self.counts,
                     **{split: (self.tokens[split], self.documents[split]) for split in self.tokens})
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / "counts.part", self.folder / "counts.npz")

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def checksums(folder: Path) -> dict[str, int]:
    """Of the small files of a corpus; the token files, which may have gigabytes, are checked as they are read."""
    return {name: zlib.crc32((folder / name).read_bytes()) for name in ("tokenizer.json", "counts.npz")}


def read_counts(folder: Path, vocab_size: int) -> dict | None:
    """What a Writer saved last in a folder; None where that is nothing, or damaged."""
    try:
        with np.load(folder / "counts.npz") as file:
            saved = dict(file)
        shapes = dict(batches=(), counts=(vocab_size,), train=(2,), heldout=(2,))
        whole = all(saved[name].shape == shape and (saved[name] >= 0).all() for name, shape in shapes.items())
        return saved if whole else None
    except Exception:  # zipfile and numpy raise many kinds
        return None


def tokenise(batch: Batch, tokenizer: Tokenizer, detokenise: bool, seq_len: int | None) -> list[tuple[str, int, np.ndarray]]:
    """For each split in a batch: how many documents, and their tokens, each with an end token or, if seq_len is given,
    padded to it with end tokens. Raises UserError for a document that does not fit."""
    parts = []
    for place, numbers, texts, split, _ in by_split(batch, detokenise):
        rows = tokenizer.encode(texts)
        for number, ids in zip(numbers, rows):
            if seq_len and len(ids) >= seq_len:
                raise UserError(f"{place}:{number}: {len(ids)} tokens and an end token do not fit --seq-len {seq_len}; "
                                "give a larger one or --packing")
            ids += [tokenizer.end] * (seq_len - len(ids) if seq_len else 1)
        flat = np.fromiter(chain.from_iterable(rows), token_type(tokenizer.vocab_size), sum(map(len, rows)))
        parts.append((split, len(texts), flat))
    return parts


def start_worker(tokenizer: Path, detokenise: bool, seq_len: int | None) -> None:
    """What a tokenising process needs to know, once."""
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    worker = Tokenizer.load(tokenizer), detokenise, seq_len
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenise_in_worker(batch: Batch) -> list[tuple[str, int, np.ndarray]]:
    return tokenise(batch, *worker)


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Processes that are started in here never hear of Ctrl-C and the like, which are their parent's to deal with."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tokenised(source: Source, first: int, path: Path, seq_len: int | None, workers: int) -> Iterator[tuple[int, list]]:
    """The position of each batch of a source, from the `first` on, and what `tokenise` makes of it by the tokenizer in
    `path`: in their order, in other processes if workers > 1."""
    batches, settings = islice(source.batches(), first, None), (path, source.detokenise, seq_len)
    if workers == 1:
        tokenizer = Tokenizer.load(path)
        for batch in batches:
            yield batch.position, tokenise(batch, tokenizer, *settings[1:])
        return
    with no_interrupts():  # its queues have a process of their own
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, settings)
    try:
        waiting = deque()  # no more than keeps all busy, so that the source is read as fast as it is tokenised
        for batch in batches:
            with no_interrupts():
                waiting.append((batch.position, pool.submit(tokenise_in_worker, batch)))
            if len(waiting) > 4 * workers:
                position, parts = waiting.popleft()
                yield position, parts.result()
        for position, parts in waiting:
            yield position, parts.result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(folder: Path, source: Source, seq_len: int | None) -> Writer:
    """Tokenises a source by folder/tokenizer.json into folder/{train,heldout}.bin, or goes on where an earlier call was cut
    off; a large one in as many processes as there are cores, MOST_WORKERS at most."""
    from tqdm import tqdm

    large = not 0 < source.size < LARGE
    writer = Writer(folder, Tokenizer.load(folder / "tokenizer.json").vocab_size)
    workers = min(cores(), MOST_WORKERS) if large else 1
    try:
        with tqdm(total=source.size or None, desc=f"tokenising {source.name}", unit="B", unit_scale=True, file=sys.stderr,
                  mininterval=1, disable=not large) as bar:
            for position, parts in tokenised(source, writer.batches, folder / "tokenizer.json", seq_len, workers):
                writer.add(parts)
                bar.set_postfix_str(f"{sum(writer.tokens.values()) / 1e6:.1f}M tokens", refresh=False)
                bar.update(position - bar.n)
        writer.save()
    finally:
        writer.close()
    return writer


def prepare(dataset: str, tokenizer: str, seq_len: int, packing: bool, seed: int, batch_size: int, vocab_size: int = 0,
            data_dir: str = "", data_url: str = "", cache: str = "data") -> Corpus:
    """Tokenises the corpus, or maps the token files of an earlier call with the same source and settings.

    packing=True joins documents by the end token and cuts blocks of seq_len; otherwise each is one row, padded with it.
    A split without a single block borrows the other's. Raises UserError for a text that cannot be used.
    """
    if packing and tokenizer in FRAMED and seq_len < 3:
        raise UserError(f"--seq-len {seq_len}: with --tokenizer {tokenizer} a row begins and ends with a token of its own; "
                        "give 3 or more")
    source = sources.find(dataset, data_dir, data_url, cache)
    settings = {"format": FORMAT, "source": source.checksum(), "tokenizer": tokenizer, "packing": packing,
                "vocab_size": vocab_size if tokenizer == "bpe" else None, "seq_len": None if packing else seq_len,
                "heldout": source.rule}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{source.name[:64]}-{key}"
    if not folder.exists():
        write_corpus(folder, source, settings, vocab_size, data_dir or dataset)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["checksums"] != checksums(folder) or settings | meta != meta:
            raise ValueError("they are not what meta.json says")
        codec = Tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        dtype = token_type(codec.vocab_size)
        splits = {split: np.memmap(folder / f"{split}.bin", dtype, mode="r", shape=(n,)) if n else np.empty(0, dtype)
                  for split, n in ((split, meta["tokens"][split]) for split in ("train", "heldout"))}
        if any((folder / f"{split}.bin").stat().st_size != ids.nbytes for split, ids in splits.items()):
            raise ValueError("there are more or fewer tokens than meta.json says")
        counts = read_counts(folder, codec.vocab_size)["counts"]
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{folder}: damaged token files ({type(error).__name__}: {str(error)[:200]}); remove the folder, "
                        "and the next run makes it again") from None
    corpus = Corpus(codec, splits, meta, torch.empty(0), seq_len, packing, seed, batch_size, False)
    borrowed = [split for split in splits if not corpus.blocks(split)]
    if len(borrowed) == 2:
        raise UserError(f"{dataset}: {sum(meta['tokens'].values())} tokens do not fill one row of --seq-len {seq_len}; "
                        "give a smaller one or --no-packing")
    if borrowed:
        corpus.splits = dict.fromkeys(splits, next(ids for split, ids in splits.items() if split not in borrowed))
        corpus.borrowed = True
        if "train" in borrowed:  # then it is a short text
            counts = np.bincount(corpus.splits["train"], minlength=codec.vocab_size)
    corpus.log_p = torch.from_numpy((counts + 1) / (counts + 1).sum()).log().float()
    return corpus


def write_corpus(folder: Path, source: Source, settings: dict, vocab_size: int, place: str) -> None:
    """Makes the token files of a source and their manifest, meta.json, or goes on with what was begun. Whoever comes while
    another process is at it waits."""
    from filelock import FileLock

    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a tokenising process, in its parent's script
        raise UserError('a script that prepares a large corpus must do so under if __name__ == "__main__":')
    part, lock = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "lock"))
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not folder.exists():
                part.mkdir(exist_ok=True)
                try:
                    fill(part, source, settings, vocab_size, place)
                except UserError:  # the same text will not do next time either
                    shutil.rmtree(part, ignore_errors=True)
                    raise
                part.rename(folder)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the files
    except BrokenProcessPool:
        raise UserError(f"{part}: a tokenising process was ended (out of memory?); the same command goes on") from None
    except OSError as error:
        raise UserError(f"{part}: cannot be written ({error.strerror or error}); make room for it in {part.parent}, and the "
                        "same command goes on") from None


def fill(folder: Path, source: Source, settings: dict, vocab_size: int, place: str) -> None:
    """Tokenizer, token files and manifest of a source. Raises UserError for a text that cannot be used."""
    if not (folder / "counts.npz").is_file():
        if not any(batch.texts for batch in source.batches()):
            raise UserError(f"{place}: no text in it; give a file with one document a line")
        make_tokenizer(settings["tokenizer"], source, vocab_size).save(folder / "tokenizer.json")
    done = write_tokens(folder, source, settings["seq_len"])
    meta = {"tokens": done.tokens, "documents": done.documents, "checksums": checksums(folder)} | settings
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
