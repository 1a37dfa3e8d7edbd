"""--html: texts that denoise under a slider, as one file that needs neither a network nor a framework."""

import base64
import html
import json
from pathlib import Path

import torch
from torch import Tensor

from sources import UserError

PAGE = Path(__file__).parent / "pictures" / "page.html"
FRAMES, TOP = 32, 3  # evaluations that a page shows, at most, and tokens of each place in them


class Film:
    """What a sampler's evaluations have said of each token: the likeliest ones and their probabilities."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def see(self, tau: Tensor, state: Tensor, probs: Tensor) -> None:
        """One evaluation at tau, probs (B, L, V); a new batch begins at tau = 0."""
        if tau == 0:
            self.batches.append([])
        self.batches[-1].append((tau.item(), *(x.cpu() for x in probs.topk(min(TOP, probs.shape[-1])))))

    def save(self, path: Path, lines: list[str], tokens: Tensor) -> None:
        """Writes the page of texts (n, L), which are `lines` when they are done. Raises UserError where it cannot."""
        frames = list(zip(*self.batches))
        chosen = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().long().unique().tolist()
        L = tokens.shape[1]
        probs, ids = (torch.stack([torch.cat([batch[k] for batch in frames[i]])[:, :L] for i in chosen]) for k in (1, 2))
        table, index = ids.unique(return_inverse=True)
        if len(table) > 2**16:
            raise UserError(f"--html {path}: {len(table)} tokens are too many for a page; give a smaller --num-samples")
        content = dict(
            tokens=[on_one_line(self.model.tokenizer.decode([i])) for i in table.tolist()], final=[
                pieces(self.model.tokenizer, ids, line) for ids, line in zip(tokens.tolist(), lines)],
            taus=[round(frames[i][0][0], 4) for i in chosen], shape=list(ids.shape),
            ids=packed(index.to(torch.uint16)), probs=packed((probs.float() * 255).round().to(torch.uint8)))
        text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")  # no </script> in it
        title = html.escape(f"{self.model.kind} of {self.model.config.dataset}")
        try:
            path.write_text(PAGE.read_text("utf-8").replace("TITLE", title).replace("CONTENT", text), "utf-8", "replace")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another --html") from None


def packed(x: Tensor) -> str:
    return base64.b64encode(x.numpy().tobytes()).decode()


def on_one_line(text: str) -> str:
    """A text with line breaks and backslashes escaped."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def pieces(tokenizer, ids: list[int], line: str) -> list[str]:
    """A line in as many pieces as it has tokens, what each of them adds; a character of several comes with their last."""
    parts, done = [], 0
    for i in range(1, len(ids) + 1):
        so_far = on_one_line(tokenizer.decode(ids[:i]))
        new = i == len(ids) or line.startswith(so_far) and len(so_far) > done
        parts.append(line[done : len(so_far) if i < len(ids) else None] if new else "")
        done = len(so_far) if new else done
    return parts
