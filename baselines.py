"""What a flow is compared with: an autoregressive (ar) and a masked diffusion (mdlm) language model, in its own transformer.

    python baselines.py --model mdlm            # trains runs/words/mdlm.pt on as many tokens as runs/words/flm.pt has seen
    python baselines.py --model ar --run-dir runs/sotu
    python baselines.py --sample --model mdlm --run-dir runs/words --sample-steps 8

Settings that are left out are those of the run's flow, but for the learning rates below. Sources: Sahoo et al. 2024,
"Simple and Effective Masked Diffusion Language Models", arXiv 2406.07524, for mdlm.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flm
import join
from flm import Rows, Transformer
from run import clear, guard, rank, say, setting, unlocks, world, write_settings

# ----------------------------------------------------------------------------------------------- 1. Autoregressive


def ar_nats(model: Transformer, tokens: Tensor) -> Tensor:
    """-log p(token | those before it) of tokens (B, L): nats (B, L)."""
    first = model.blank.expand(len(tokens), 1, -1)
    state = torch.cat([first, model.clean(tokens[:, :-1])], dim=1)
    return model(state, torch.zeros(len(tokens), device=tokens.device), targets=tokens)


def ar_loss(model: Transformer, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Nats a position: tokens (B, L) -> loss (B,), tau (B,), which is 0: there is no time."""
    return ar_nats(model, tokens).mean(1), torch.zeros(len(tokens), device=tokens.device)


def ar_sample(model: Transformer, n: int, steps: int, seed: int, known: Tensor | None = None) -> Tensor:
    """Writes n texts token by token, L evaluations of one position each (`steps` says nothing): tokens (n, L). It reads the
    tokens `known` (L,) or (n, L), -1 where there is none, as it comes to them, and those ahead have no say."""
    def solve(rows: Rows, known: Tensor | None) -> Tensor:
        L, texts, past = model.config.seq_len, [], [[] for _ in model.blocks]
        uniform = uniforms(rows, L, 1, model.device)[..., 0]
        tau = torch.zeros(len(rows.index), device=model.device)
        state = model.blank.expand(len(rows.index), 1, -1)
        for i in range(L):
            token = pick(model(state, tau, past=past).softmax(-1)[:, 0], uniform[:, i])
            texts.append(token if known is None else torch.where(known[:, i] < 0, token, known[:, i]))
            state = model.clean(texts[-1][:, None])
        return torch.stack(texts, dim=1)
    return flm.write(model, n, seed, solve, known)


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (N,) of the distributions probs (N, V), by inverting their sums at uniform (N,)."""
    sums = probs.cumsum(-1)
    return (sums < uniform[:, None] * sums[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)


def uniforms(rows: Rows, L: int, dims: int, device: torch.device) -> Tensor:
    """Even draws from (0, 1), (B, L, dims)."""
    return torch.special.ndtr(rows.draw(L, dims, device)[1])


# --------------------------------------------------------------------------------------------- 2. Masked diffusion
# A token is known by time tau with probability tau, each on its own ("log-linear schedule"); what is known stays.


def reveal(model: Transformer, tokens: Tensor, known: Tensor) -> Tensor:
    """The state (B, L, D): the embedding of known tokens, `blank` elsewhere."""
    return torch.where(known[..., None], model.clean(tokens), model.blank)


def mdlm_loss(model: Transformer, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """The bound on -log p, nats a position, estimated at one time a row: cross-entropy of the masked tokens over 1 - tau.
    tokens (B, L) -> loss (B,), tau (B,)."""
    tau, white = rows.draw(tokens.shape[1], 1, tokens.device)
    known = white[..., 0] < torch.special.ndtri(tau)[:, None]
    nll = model(reveal(model, tokens, known), tau, targets=tokens)
    return (nll * ~known).mean(1) / (1 - tau).clamp(min=1e-6), tau  # tau may round to 1, where nothing is masked


def mdlm_sample(model: Transformer, n: int, steps: int, seed: int, known: Tensor | None = None) -> Tensor:
    """Writes n texts in `steps` evaluations of ancestral sampling: tokens (n, L). Those that are `known`, (L,) or (n, L), -1
    where there is none, are revealed from the start.

    Each token has a time, even in (0, 1), at which it is revealed, drawn from its own distribution: so from tau to tau' a
    masked one comes with probability (tau' - tau) / (1 - tau). Tokens that come in one step do not know of each other.
    """
    def solve(rows: Rows, known: Tensor | None) -> Tensor:
        B, L = len(rows.index), model.config.seq_len
        tokens, share = torch.zeros(B, L, dtype=torch.long, device=model.device), torch.zeros(B, device=model.device)
        when, uniform = uniforms(rows, L, 2, model.device).clamp(max=1 - 1e-7).unbind(-1)  # below 1: all come in the end
        if known is not None:
            tokens, when, share = known.clamp(min=0), torch.where(known < 0, when, -1.0), (known >= 0).float().mean(1)
        grid = torch.linspace(0, 1, steps + 1, device=model.device)
        for tau, tau_next in zip(grid, grid[1:]):
            revealed = when < tau
            come = ~revealed & (when < tau_next)
            logits = model(reveal(model, tokens, revealed), share + (1 - share) * tau)
            tokens[come] = pick(logits[come].softmax(-1), uniform[come])
        return tokens
    return flm.write(model, n, seed, solve, known)


# -------------------------------------------------------------------------------------------------- 3. Command line

LOSSES, SAMPLERS = {"mdlm": mdlm_loss, "ar": ar_loss}, {"mdlm": mdlm_sample, "ar": ar_sample}
PRESETS = {"ar": {"words": dict(lr=6e-3), "sotu": dict(lr=1e-2)},  # each the best of three
           "mdlm": {"words": dict(lr=3e-3), "sotu": dict(lr=5e-3)}}


@dataclass
class Config(flm.Config):
    """The settings of a baseline. All that is not named here or given is its flow's."""

    model: str = setting("mdlm", "autoregressive, or masked diffusion", choices=tuple(LOSSES))
    parameterization: str = setting("linear", "")  # both read embeddings
    run_dir: str = setting("runs/words", "folder of a run of flm.py")
    sample_steps: int = setting(64, "network evaluations for a text of mdlm", 1, 2**20)
    churn: float = setting(0.0, "")  # for flows, as the next
    guidance: float = setting(0.0, "")
    html: str = setting("", "")


def command_line(argv: list[str]) -> tuple[dict, set[str]]:
    changed = {f"{kind} on {dataset}": preset for kind in PRESETS for dataset, preset in PRESETS[kind].items()}
    return join.command_line(argv, Config, __doc__, changed)


@unlocks()
def main(argv: list[str]) -> None:
    settings, given = command_line(argv)
    kind = settings["model"]
    loss, sample = LOSSES[kind], SAMPLERS[kind]
    if settings["sample"]:
        return flm.write_samples(Config(**settings), kind, sample)
    config, training, flow, corpus = join.join(settings, given, kind, Config, PRESETS[kind])
    if rank() == 0 and not config.resume:
        clear(Path(config.run_dir), kind)
        write_settings(config, kind)
    model = flm.build(training, flow.tokenizer, flow.log_p, kind).to(flow.device)
    say(f"{config.run_dir}: {kind}, {config.max_steps} steps of {config.batch_size} x {config.seq_len} tokens; "
        f"{'bfloat16' if config.bf16 else 'float32'} on {flow.device}, {world()} x {torch.get_num_threads()} threads")
    flm.train(model, loss, corpus, training, kind, sample)
    if not 0 < config.stop_after < config.max_steps:
        for steps in (1, 4, 16, 64) if kind == "mdlm" else (config.seq_len,):
            flm.show(f"{steps} step{'s' * (steps > 1)}", model, sample(model, 8, steps, config.seed))


if __name__ == "__main__":
    sys.exit(guard(main, resumes=True))
