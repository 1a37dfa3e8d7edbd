"""Text in, token files out: corpora, tokenizers, memory-mapped tokens, batches.

    corpus = data.prepare("words", tokenizer="chars", seq_len=16, packing=False, seed=0, batch_size=256)
    corpus.batch("train", step=0, rows=range(0, 256))        # (256, 16) token ids

A corpus is a UTF-8 text with one document a line (.txt, .txt.gz, .txt.xz). One line in twenty is held out, chosen by a
hash of the line, so that it stays held out whatever else changes. Tokens are written once to data/NAME-HASH/ and mapped
from there; the hash covers the source's bytes and every setting, so a change of either makes new files.
"""

import functools
import gzip
import hashlib
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

EMBEDDED = {name: Path(__file__).parent / "corpora" / f"{name}.txt.xz" for name in ("words", "sotu")}
TOKENIZERS = ("chars", "bpe", "gpt2", "bert-base-uncased")
HELD_OUT = 20  # one line in this many
FORMAT = 1  # of the token files; part of their hash


class UserError(Exception):
    """A mistake that the user can mend; its message is the one line to print (exit status 2)."""


# ---------------------------------------------------------------------------------------------------------- documents


def source_file(dataset: str) -> Path:
    """The file behind --dataset: an embedded corpus by name, or any path. Raises UserError where there is none."""
    path = EMBEDDED.get(dataset, Path(dataset))
    if not path.is_file():
        raise UserError(f"--dataset {dataset}: not a file; give {', '.join(EMBEDDED)} or a text file")
    return path


def documents(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line) for each line of a .txt, .txt.gz or .txt.xz that is not blank."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT == 0


# --------------------------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """Text <-> token ids, and the id of the end token.

    `content` is what tokenizer.json holds, enough to rebuild it anywhere: {"kind": "chars", "chars": ...},
    {"kind": "bpe" | "bert-base-uncased", "model": ...} (a `tokenizers` model) or {"kind": "gpt2"} (tiktoken's).
    """

    def __init__(self, content: dict):
        self.content, self.kind = content, content["kind"]
        if self.kind == "chars":  # ids 1.. in the order of `chars`; 0 ends a document
            self.ids = {char: i for i, char in enumerate(content["chars"], start=1)}
            self.end, self.vocab_size = 0, len(self.ids) + 1
        elif self.kind == "gpt2":
            import tiktoken

            try:
                self.codec = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever its HTTP client raises
                raise UserError(f"--tokenizer gpt2: tiktoken could not download it ({type(error).__name__}); connect "
                                "once, or point TIKTOKEN_CACHE_DIR to a copy") from None
            self.end, self.vocab_size = self.codec.eot_token, self.codec.n_vocab
        else:
            from tokenizers import Tokenizer as Codec

            self.codec = Codec.from_str(content["model"])
            self.codec.encode_special_tokens = True  # "[SEP]" in a text is five characters, not the end token
            size = self.codec.get_vocab_size()
            bert_end = self.codec.token_to_id("[SEP]") if self.kind == "bert-base-uncased" else None
            self.end, self.vocab_size = (size, size + 1) if bert_end is None else (bert_end, size)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without an end token. Raises UserError for a character that `chars` does not have."""
        if self.kind == "chars":
            try:
                return [[self.ids[char] for char in text] for text in texts]
            except KeyError as error:
                raise UserError(f"the character {error} is not in the vocabulary of {len(self.ids)} characters") from None
        if self.kind == "gpt2":
            return self.codec.encode_ordinary_batch(texts)
        return [encoding.ids for encoding in self.codec.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of one row of ids; an end token is a line break, those that pad the row are dropped."""
        pieces, piece = [], []
        for i in [*map(int, ids), self.end]:
            if i != self.end:
                piece.append(i)
            else:
                pieces.append(self._decode(piece))
                piece = []
        return "\n".join(pieces).rstrip("\n")

    def _decode(self, ids: list[int]) -> str:
        if self.kind == "chars":
            return "".join(self.content["chars"][i - 1] for i in ids)
        return self.codec.decode(ids)

    @property
    def checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.content), encoding="utf-8")

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


def make_tokenizer(kind: str, path: Path, vocab_size: int) -> Tokenizer:
    """Builds the tokenizer `kind` for a corpus: `chars` from all its lines, `bpe` from its training lines.

    vocab_size counts the end token and is used by `bpe` alone. Raises UserError where the text cannot fill it.
    """
    if kind == "chars":
        return Tokenizer({"kind": kind, "chars": "".join(sorted({char for _, text in documents(path) for char in text}))})
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
        codec.train_from_iterator((text for _, text in documents(path) if not held_out(text)), trainer)
        if codec.get_vocab_size() + 1 != vocab_size:
            raise UserError(f"--vocab-size {vocab_size}: this text gives {codec.get_vocab_size() + 1} tokens; give that "
                            "number, or use --tokenizer chars")
    else:
        try:
            codec = Codec.from_pretrained(kind)
        except Exception as error:  # whatever the hub's client raises
            raise UserError(f"--tokenizer {kind}: could not be downloaded ({type(error).__name__}); connect once") from None
    return Tokenizer({"kind": kind, "model": codec.to_str()})


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

    def blocks(self, split: str) -> int:
        """How many sequences of L tokens the split has."""
        return len(self.splits[split]) // self.seq_len

    def batch(self, split: str, step: int, rows: range) -> torch.Tensor:
        """Rows of the global batch of `step`: (len(rows), L) int64, a pure function of its arguments and the seed.

        Training goes through all blocks in a new order each epoch; packed text is also cut at a new place each epoch.
        The held-out split is read in order.
        """
        tokens, n, L = self.splits[split], self.blocks(split), self.seq_len
        place = step * self.batch_size + np.asarray(rows)
        start = place % n * L
        if split == "train":
            for epoch in np.unique(place // n):
                here = place // n == epoch
                order, cut = shuffle(self.seed, int(epoch), n)
                start[here] = order[place[here] % n] * L + (cut % len(tokens) if self.packing else 0)
        index = (start[:, None] + np.arange(L)) % len(tokens)
        return torch.from_numpy(tokens[index].astype(np.int64))


@functools.lru_cache(maxsize=2)
def shuffle(seed: int, epoch: int, n: int) -> tuple[np.ndarray, int]:
    """The order of an epoch's n blocks and the place of its first cut."""
    random = np.random.default_rng([seed, epoch])
    return random.permutation(n), int(random.integers(2**62))


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_tokens(folder: Path, path: Path, tokenizer: Tokenizer, seq_len: int, packing: bool) -> dict[str, int]:
    """Tokenises `path` into folder/{train,heldout}.bin, each token's count in folder/counts.npy; returns their lengths."""
    dtype = token_type(tokenizer.vocab_size)
    lengths = {"train": 0, "heldout": 0}
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    with open(folder / "train.bin", "wb") as train, open(folder / "heldout.bin", "wb") as heldout:
        lines = documents(path)
        while batch := list(islice(lines, 4096)):
            seen = []
            for (number, text), ids in zip(batch, tokenizer.encode([text for _, text in batch])):
                if not packing and len(ids) >= seq_len:
                    raise UserError(f"{path}:{number}: {len(ids)} tokens and an end token do not fit --seq-len {seq_len}; "
                                    "give a larger one or --packing")
                ids = ids + [tokenizer.end] * (1 if packing else seq_len - len(ids))
                split = "heldout" if held_out(text) else "train"
                (heldout if split == "heldout" else train).write(np.array(ids, dtype).tobytes())
                lengths[split] += len(ids)
                if split == "train":
                    seen += ids
            counts += np.bincount(seen, minlength=len(counts)) if seen else 0
    np.save(folder / "counts.npy", counts)
    return lengths


def prepare(dataset: str, tokenizer: str, seq_len: int, packing: bool, seed: int, batch_size: int, vocab_size: int = 0,
            cache: str = "data") -> Corpus:
    """Tokenises the corpus, or maps the token files of an earlier call with the same source and settings.

    packing=True joins documents by the end token and cuts blocks of seq_len; otherwise each is one row, padded with it.
    A split without a single block borrows the other's. Raises UserError for a text that cannot be used.
    """
    path = source_file(dataset)
    with open(path, "rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.name.split(".")[0]
    settings = {"format": FORMAT, "source": source, "tokenizer": tokenizer, "packing": packing,
                "vocab_size": vocab_size if tokenizer == "bpe" else None, "seq_len": None if packing else seq_len,
                "heldout": f"crc32(line) % {HELD_OUT} == 0"}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{name}-{key}"
    if not (folder / "meta.json").is_file():
        if next(documents(path), None) is None:
            raise UserError(f"{path}: no text in it; give a file with one document a line")
        part = None
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
            tokens = make_tokenizer(tokenizer, path, vocab_size)
            tokens.save(part / "tokenizer.json")
            lengths = write_tokens(part, path, tokens, seq_len, packing)
            meta = settings | {"vocab_size": tokens.vocab_size, "tokens": lengths}
            (part / "meta.json").write_text(json.dumps(meta, indent=1))
            try:
                part.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():  # else another process was faster: its files are the same
                    raise
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        finally:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = Tokenizer.load(folder / "tokenizer.json")
        dtype = token_type(tokens.vocab_size)
        splits = {split: np.memmap(folder / f"{split}.bin", dtype, mode="r", shape=(n,)) if n else np.empty(0, dtype)
                  for split, n in meta["tokens"].items()}
        counts = np.load(folder / "counts.npy")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: damaged token files ({error}); remove the folder") from None
    borrowed = [split for split in splits if len(splits[split]) < seq_len]
    if len(borrowed) == 2:
        raise UserError(f"{path}: {sum(meta['tokens'].values())} tokens do not fill one row of --seq-len {seq_len}; "
                        "give a smaller one or --no-packing")
    if borrowed:
        splits = dict.fromkeys(splits, next(tokens for split, tokens in splits.items() if split not in borrowed))
        counts = np.bincount(splits["train"], minlength=tokens.vocab_size)
    log_p = torch.from_numpy((counts + 1) / (counts + 1).sum()).log().float()
    return Corpus(tokens, splits, meta, log_p, seq_len, packing, seed, batch_size, bool(borrowed))
