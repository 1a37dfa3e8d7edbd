"""What is known of a text before it is written: --prompt and --infill, as tokens (L,) with -1 where there is none."""

import re

import torch
from torch import Tensor

from data import Tokenizer
from page import on_one_line
from sources import UserError

MASK = re.compile(r"\[MASK(?::(\d{1,9}))?\]")


def parse(tokenizer: Tokenizer, L: int, packing: bool, prompt: str, infill: str, mask_char: str) -> tuple[Tensor, int]:
    """The known tokens (L,) of a row, and how many of its places, from the first on, are to be shown.

    A prompt begins the text. An infill is a text with gaps: `mask_char` for each unknown token of a vocabulary of
    characters, [MASK] or [MASK:n] for one or n tokens of another. Its length is known where rows are padded; in packed rows
    the text goes on behind it, unseen. Raises UserError for what does not fit or cannot be encoded, or if none is unknown.
    """
    flag, text = ("--infill", infill) if infill else ("--prompt", prompt)
    name = f"{flag} {on_one_line(text if len(text) <= 40 else text[:37] + '...')}"
    if prompt and infill:
        raise UserError(f"{name}: goes without --prompt; an infill with its gaps at the end is a prompt")
    gap = f"one {mask_char}" if tokenizer.kind == "chars" else "[MASK] or [MASK:5]"
    if len(mask_char) != 1:
        raise UserError(f"--mask-char {mask_char}: must be one character")
    try:
        text.encode()
        ids = encode(tokenizer, text, mask_char if infill else "")
    except UnicodeEncodeError:
        raise UserError(f"{flag}: is not UTF-8 text; write it in UTF-8") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if infill and -1 not in ids:
        raise UserError(f"{name}: no position in it is unknown; put {gap} for each token to write")
    if not ids:
        raise UserError(f"{name}: has no token; leave it out")
    frame = int(packing and tokenizer.begin is not None)
    room = L - 2 * frame if packing else L - 1  # the last place of a padded row is an end token's
    if len(ids) > room:
        raise UserError(f"{name}: is {len(ids)} tokens long and the model's texts have {room} at most; shorten it")
    if prompt and len(ids) == room:
        raise UserError(f"{name}: is as long as the model's texts, {room} tokens, so none is unknown; shorten it")
    rest = tokenizer.end if infill and not packing else -1
    known = ([tokenizer.begin] * frame + ids + [rest] * L)[:L]
    return torch.tensor(known), frame + len(ids) if infill else L


def encode(tokenizer: Tokenizer, text: str, mask_char: str) -> list[int]:
    """Ids of a text, -1 in its gaps; without gaps if mask_char is ""."""
    if tokenizer.kind == "chars":
        return [-1 if char == mask_char else tokenizer.encode([char])[0][0] for char in text]
    pieces = MASK.split(text) if mask_char else [text]  # text, count or None, text, ...
    ids = []
    for i, piece in enumerate(pieces):
        if i % 2:
            ids += [-1] * min(int(piece or 1), 10**6)  # more than any row has
        else:  # the space before a word is the first character of its token
            ids += tokenizer.encode([piece if i + 1 == len(pieces) and mask_char else piece.rstrip(" ")])[0]
    return ids
