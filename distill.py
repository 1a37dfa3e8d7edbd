"""Flow map language model (FMLM): a flow distilled into a map that writes a whole text in one network evaluation.

    python distill.py                                              # distils runs/words/flm.pt into runs/words/fmlm.pt
    python distill.py --run-dir runs/sotu --objective lagrangian
    python distill.py --sample --run-dir runs/words --sample-steps 1 --num-samples 20
    torchrun --standalone --nproc_per_node=8 distill.py --run-dir runs/my

The map X_{s,t} takes a state at time s to where the flow has it at time t. The same network as the flow's, asked with two
times, gives the mean denoiser delta_{s,t}, one distribution a position:  X_{s,t}(x) = (1-t)/(1-s) x + (t-s)/(1-s) delta.
Settings that are left out are those of the flow that is distilled, but for a few defaults below. Paper: arXiv 2602.16813.
"""

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flm
import join
from flm import Clock, Rows, Transformer
from run import clear, flag, guard, rank, say, setting, unlocks, world, write_settings
from sources import UserError

Delta = Callable[[Tensor, Tensor, Tensor], Tensor]  # (state, tau_s (B,), tau_t (B,)) -> delta_{s,t} (B, L, V)

# ------------------------------------------------------------------------------------------------------- 1. The map


def mean_denoiser(model: nn.Module, known: Tensor | None = None) -> Delta:
    """delta_{s,t} as the two-time network gives it, with some tokens known."""
    return lambda state, tau_s, tau_t: model(state, tau_s, tau_t, known).softmax(-1)


def move(model: nn.Module, state: Tensor, probs: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """X_{s,t}(x) = x + (t-s)/(1-s) (delta - x), from the state x at s and probs = delta_{s,t}(x)."""
    s, t = times(model.clock, tau_s, tau_t)
    return torch.lerp(state, model.clean(probs), (t - s) / (1 - s).clamp(min=1e-9))


def times(clock: Clock, *taus: Tensor) -> list[Tensor]:
    """t(tau) of each tau (B,), as (B, 1, 1)."""
    return [clock.t(tau)[:, None, None] for tau in taus]


def flow_map(model: nn.Module, state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """X_{s,t}: where the flow takes `state` (B, L, V or D), being at tau_s (B,), by tau_t (B,).

    X_{t,t} is the identity and X_{s,1} the state of the probabilities themselves.
    """
    return move(model, state, mean_denoiser(model)(state, tau_s, tau_t), tau_s, tau_t)


def sample(model: Transformer, n: int, steps: int, seed: int, renoise: float = 0.0, known: Tensor | None = None,
           delta: Callable = mean_denoiser, see: Callable | None = None) -> Tensor:
    """Writes n texts in `steps` evaluations of the map: tokens (n, L), from the noise that flm.sample has for this seed, and
    with the tokens `known` (L,) or (n, L), -1 where there is none. delta(model, known) gives the map's mean denoiser, `see`
    is flm.euler's."""
    def solve(rows: Rows, known: Tensor | None) -> Tensor:
        return flm.euler(delta(model, known), flm.start(model, rows), model.clock, steps, model.clean,
                         (lambda t, t_next: renoise) if renoise else None,
                         lambda step: flm.start(model, rows.fresh(step)), see).argmax(-1)
    return flm.write(model, n, seed, solve, known)


# -------------------------------------------------------------------------------------------------- 2. Objectives
# Each gives what delta_{s,t} must equal if X is the flow of `denoiser`, whose D_t is delta_{t,t}: a target for the network,
# (B, L, V) from its own delta, that is held fixed. All have the same solution; they differ in what stands between a network
# and it.


def semigroup(delta: Delta, denoiser: Callable, model: nn.Module, state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """From s to t is from s to u and on from u to t, u half-way in tau; in probabilities:

    delta_{s,t}(x) = w delta_{s,u}(x) + (1-w) delta_{u,t}(X_{s,u}(x)),  w = (1-t)(u-s) / ((1-u)(t-s)), from 0 to 1.

    A mean of two distributions, without a derivative: the stable one.
    """
    tau_u = (tau_s + tau_t) / 2
    s, u, t = times(model.clock, tau_s, tau_u, tau_t)
    first = delta(state, tau_s, tau_u)
    second = delta(move(model, state, first, tau_s, tau_u), tau_u, tau_t)
    w = (1 - t) * (u - s) / ((1 - u) * (t - s))
    # 0 at t = 1, also where u rounds to 1; as t falls to s it tends to 1/2
    w = torch.where(t == 1, 0.0, torch.where(t - s < 1e-6, 0.5, w))
    return torch.lerp(second, first, w.clamp(0, 1))


def lagrangian(delta: Delta, denoiser: Callable, model: nn.Module, state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """The end moves with the flow, d/dt X_{s,t} = b_t(X_{s,t}):

    delta_{s,t}(x) = D_t(X_{s,t}(x)) - (1-t)(t-s)/(1-s) d/dt delta_{s,t}(x).

    Unstable where the network's slope in t is large and wrong, early in training and for long journeys: what the subtraction
    leaves below zero is cut off, which biases the rest. At t = 1 it is empty, since D_1(X) = X whatever X is, and training
    there collapses to one text: use it up to tau_t = .99 only.
    """
    s, t = times(model.clock, tau_s, tau_t)
    probs, slope = derivative(lambda end: delta(state, tau_s, model.clock.tau(end)), (t[:, 0, 0],),
                              (torch.ones_like(tau_t),))
    ahead = denoiser(move(model, state, probs, tau_s, tau_t), tau_t)
    return to_simplex(ahead - (1 - t) * (t - s) / (1 - s) * slope)


def eulerian(delta: Delta, denoiser: Callable, model: nn.Module, state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
    """The end does not depend on where along the path one starts, d/ds X_{s,t}(x_s) = 0 with dx/ds = b_s:

    delta_{s,t}(x) = D_s(x) + (t-s)(1-s)/(1-t) d/ds delta_{s,t}(x_s).

    Unstable towards t = 1, where the factor of the slope, taken through the network along V dimensions, has no bound: again
    up to tau_t = .99 only.
    """
    s, t = times(model.clock, tau_s, tau_t)
    now = denoiser(state, tau_s)
    velocity = (model.clean(now) - state) / (1 - s)
    _, slope = derivative(lambda begin, x: delta(x, model.clock.tau(begin), tau_t), (s[:, 0, 0], state),
                          (torch.ones_like(tau_s), velocity))
    return to_simplex(now + (t - s) * (1 - s) / (1 - t) * slope)


def derivative(f: Callable, at: tuple, along: tuple) -> tuple[Tensor, Tensor]:
    """f(*at) and its derivative along a tangent. Fused attention has no forward derivative, so the plain one computes it."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, at, along)


def to_simplex(target: Tensor) -> Tensor:
    """A distribution from numbers that sum to 1: the negative ones cut off, the rest scaled."""
    positive = target.clamp(min=0)
    return positive / positive.sum(-1, keepdim=True)


TARGETS = {"semigroup": semigroup, "lagrangian": lagrangian, "eulerian": eulerian}


# ------------------------------------------------------------------------------------------------------ 3. Losses

WHOLE = 1 / 32  # share of the journeys that go from noise to data; more teach a map from its own faults


def journeys(model: nn.Module, tokens: Tensor, rows: Rows, last: float = 1.0, stand: slice = slice(0)) -> tuple[Tensor, ...]:
    """A journey for each row of tokens (B, L): the state at its start, tau_s, tau_t (B,), and the draw tau (B,).

    Rows in `stand` go nowhere: tau, stratified or rows.tau, is where they are. For the others it is the duration, the last
    WHOLE of its range being stretched to 1, so that this share goes from noise to data; their start is even over what the
    duration leaves, by multiples of the golden section, which fill it as evenly as strata do. `last` scales start and end.
    """
    tau, white = rows.draw(tokens.shape[1], model.noise_dims, tokens.device)
    duration = (tau / (1 - WHOLE)).clamp(max=1) if rows.tau is None else tau
    index = torch.arange(rows.index.start, rows.index.stop, device=tau.device)
    place = (index * 2654435769 + flm.mix(rows.seed, rows.step)) % 2**32 / 2**32  # 2^32 / 1.618...: exact on every device
    tau_s = last * (1 - duration) * place
    tau_t = tau_s + last * duration
    tau_s[stand] = tau_t[stand] = tau[stand]
    return model.noise(white).lerp_(model.clean(tokens), *times(model.clock, tau_s)), tau_s, tau_t, tau


def map_loss(objective: str, teacher: Callable | None) -> Callable:
    """The loss of --objective: even rows of the batch stand at one time, odd ones travel.

    Where t = s, delta_{t,t} is held to the teacher's D_t or, without a teacher, to the tokens; elsewhere to the target of
    the objective. Cross-entropy less the target's entropy: nats a position from the target, 0 for the true map if it has
    a teacher, and for what a row is told. lagrangian and eulerian journeys end by tau = .99; a sample asks
    for 1, just beyond.
    """
    def loss(model: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        odd = rows.index.start % 2
        stand, go = slice(odd, None, 2), slice(1 - odd, None, 2)
        state, tau_s, tau_t, tau = journeys(model, tokens, rows, 1.0 if objective == "semigroup" else 0.99, stand)
        known = model.told(tokens, rows)

        def denoiser(part: slice) -> Callable:
            here = known if known is None else known[part]
            if not teacher:
                return lambda state, tau: model(state, tau, tau, here).softmax(-1)
            return lambda state, tau: teacher(state, tau, known=here).softmax(-1)
        with torch.no_grad():
            target = torch.zeros(*tokens.shape, model.V, device=tokens.device).scatter_(-1, tokens[..., None], 1.0)
            if teacher:
                target[stand] = denoiser(stand)(state[stand], tau_s[stand])
            delta = mean_denoiser(model, known if known is None else known[go])
            target[go] = TARGETS[objective](delta, denoiser(go), model, state[go], tau_s[go], tau_t[go])
            entropy = torch.special.entr(target).sum(-1)  # 0 where a token is known
        return (model(state, tau_s, tau_t, known, targets=target) - entropy).mean(1), tau
    return loss


class Correction(Transformer):
    """The first network of two-stage: what the map adds to one straight step of the teacher, to second order,

    X_{s,t}(x) = x + (t-s) b_s(x) + (t-s)^2/2 g_{s,t}(x),  so that  delta_{s,t} = D_s + (1-s)(t-s)/2 g_{s,t}.

    Its outputs are g itself, zero at first, and log_weight holds the log of the error expected in each tenth of tau_s.
    """

    def __init__(self, *network):
        super().__init__(*network)
        self.log_weight = nn.Parameter(torch.zeros(10))

    def start_at_zero(self) -> None:
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if not self.linear:
            self.gain.requires_grad_(False)  # Bayes' rule has no part in g

    def logits(self, x: Tensor, state: Tensor | None, weight: Tensor | None) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias)  # no cap: g reaches hundreds

    def insist(self, z: Tensor, known: Tensor) -> Tensor:
        return z * (known < 0)[..., None]  # the teacher is certain already


def corrected(correction: nn.Module, teacher: Callable, known: Tensor | None = None) -> Delta:
    """delta_{s,t} of a correction network: it sums to one, and is positive as far as it is right."""
    def delta(state: Tensor, tau_s: Tensor, tau_t: Tensor) -> Tensor:
        s, t = times(correction.clock, tau_s, tau_t)
        with torch.no_grad():
            now = teacher(state, tau_s, known=known).softmax(-1)
        g = correction(state, tau_s, tau_t, known)
        return now + (1 - s) * (t - s) / 2 * (g - g.mean(-1, keepdim=True))
    return delta


def squared_loss(model: nn.Module, tokens: Tensor, rows: Rows, delta: Callable, target: Callable) -> tuple[Tensor, ...]:
    """|X - X'|^2 over V dimensions, X and X' being the maps of delta(known) and of the fixed target(known), mean over
    positions: the error (B,), tau_s (B,), and the drawn tau (B,)."""
    state, tau_s, tau_t, tau = journeys(model, tokens, rows)
    known = model.told(tokens, rows)
    with torch.no_grad():
        fixed = target(known)(state, tau_s, tau_t)
    s, t = times(model.clock, tau_s, tau_t)
    error = (t - s) / (1 - s) * (delta(known)(state, tau_s, tau_t) - fixed)
    return error.square().sum(-1).mean(1), tau_s, tau


def correction_loss(teacher: Callable) -> Callable:
    """two-stage, first: the correction obeys the semigroup in squared error, each tenth of tau_s weighted by what is learned
    of its size, exp(-w) error + w."""
    def loss(model: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        delta = partial(corrected, model, teacher)
        error, tau_s, tau = squared_loss(model, tokens, rows, delta,
                                         lambda known: partial(semigroup, delta(known), None, model))
        weight = model.log_weight[(tau_s * 10).long().clamp(max=9)]
        return error * torch.exp(-weight) + weight, tau
    return loss


def regression_loss(correction: nn.Module, teacher: Callable) -> Callable:
    """two-stage, second: one network that gives probabilities is regressed on the map of both."""
    def loss(model: nn.Module, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        error, _, tau = squared_loss(model, tokens, rows, partial(mean_denoiser, model),
                                     partial(corrected, correction, teacher))
        return error, tau
    return loss


# -------------------------------------------------------------------------------------------------- 4. Command line


@dataclass
class Config(flm.Config):
    """The settings of a distillation. All that is not named here or given is its flow's."""

    objective: str = setting("semigroup", "what the map is trained to obey", choices=(*TARGETS, "two-stage"))
    teacher: str = setting("", "flow that teaches, a checkpoint or its folder; left out: the run's; none: the text teaches "
                               "a new network of its shape")
    teacher_guidance: float = setting(0.0, "guidance of the teacher, as of flm.py --sample: the map writes what the guided "
                                      "flow does", 0)
    renoise: float = setting(0.0, "share of fresh noise between the steps of --sample: 0, the plain map, to 1, all", 0, 1)
    churn: float = setting(0.0, "")  # for flows, as the next
    guidance: float = setting(0.0, "")
    beta2: float = setting(0.95, "AdamW's second beta", 0, 1)
    dropout: float = setting(0.0, "on the residual branches", 0, 1)
    taught: int = setting(0, "")  # fingerprint of the teacher
    run_dir: str = setting("runs/words", "folder of a finished run of flm.py")
    sample_steps: int = setting(1, "network evaluations for a text", 1, 2**20)


PRESETS = {"words": dict(max_steps=1000, lr=4e-3),  # for 5 minutes on two slow cores
           "sotu": dict(max_steps=1000, lr=4e-3)}


def command_line(argv: list[str]) -> tuple[dict, set[str]]:
    return join.command_line(argv, Config, __doc__, PRESETS)


def load_teacher(name: str, flow: Transformer) -> Transformer:
    """The flow of another run. Raises UserError unless it reads the states that this run's flow reads."""
    path = Path(name) if name.endswith(".pt") else Path(name, "flm.pt")
    try:
        teacher = join.load_flow(path)
    except UserError as error:
        raise UserError(f"--teacher {error}") from None
    if teacher.tokenizer.checksum != flow.tokenizer.checksum:
        raise UserError(f"--teacher {path}: has another vocabulary than the run's flow; give a flow of the same text")
    for name in ("parameterization", "seq_len"):
        theirs, ours = (getattr(model.config, name) for model in (teacher, flow))
        if theirs != ours:
            raise UserError(f"--teacher {path}: its {flag(name)} is {theirs}, the run's flow has {ours}; train it alike")
    if flow.mark is not None and teacher.mark is None:
        raise UserError(f"--teacher {path}: was trained without --condition-prob, the run's flow with it; train it alike")
    if flow.linear and not torch.equal(teacher.embedding, flow.embedding):
        raise UserError(f"--teacher {path}: has another input embedding; a linear flow can only teach its own map")
    return teacher


def fingerprint(model: Transformer) -> int:
    """A checksum of the output weights, which every training step changes."""
    return zlib.crc32(model.head.weight.detach().cpu().numpy().tobytes())


def student(make: type, config: flm.Config, flow: Transformer, kind: str, new: bool) -> Transformer:
    """The network to train: the flow, with a second time, or a new one of its shape."""
    model = flm.build(config, flow.tokenizer, flow.log_p, kind, make).requires_grad_(True)
    if not new:
        model.load_state_dict(flow.state_dict(), strict=False)  # all but what is Correction's own
        model.embedding.requires_grad_(not flow.linear)  # E is the coordinate system of the teacher's states
    if isinstance(model, Correction):
        model.start_at_zero()
    return model


@unlocks()
def main(argv: list[str]) -> None:
    settings, given = command_line(argv)
    folder = Path(settings["run_dir"])
    if settings["sample"]:
        if (folder / "correction.pt").exists() and not (folder / "fmlm.pt").exists():
            raise UserError(f"{folder}: has the first of two stages; go on: python distill.py --run-dir {folder} --resume")
        return flm.write_samples(Config(**settings), "fmlm", partial(sample, renoise=settings["renoise"]))
    config, training, flow, corpus = join.join(settings, given, "fmlm", Config, PRESETS)
    device = flow.device
    teacher = flow if config.teacher == "" else None if config.teacher == "none" else load_teacher(config.teacher, flow)
    shown, taught = teacher, fingerprint(teacher) if teacher else 0
    if config.resume and config.taught != taught:
        raise UserError(f"{folder}: its teacher is not the one this map was begun with; --overwrite distils it anew")
    config.taught = taught
    if config.objective == "two-stage" and not teacher:
        raise UserError("--objective two-stage: corrects a teacher; leave out --teacher none")
    if config.objective == "two-stage" and config.max_steps < 2:
        raise UserError("--max-steps 1: two stages need 2")
    if config.teacher_guidance and not teacher:
        raise UserError(f"--teacher-guidance {config.teacher_guidance}: guides a teacher; leave out --teacher none")
    training.compile = config.compile and config.objective not in ("lagrangian", "eulerian")  # jvp runs uncompiled
    if teacher:
        teacher.to(device).config.bf16 = config.bf16
        if training.compile and device.type == "cuda":
            teacher.compile()
        teacher = flm.guided(teacher, config.teacher_guidance)
    if rank() == 0 and not config.resume:
        clear(folder, "fmlm", "correction")
        write_settings(config, "fmlm")
    say(f"{folder}: {config.objective} distillation, {config.max_steps} steps of {config.batch_size} x {config.seq_len} "
        f"tokens; {flow.config.parameterization} network, {'bfloat16' if config.bf16 else 'float32'} on {device}, "
        f"{world()} x {torch.get_num_threads()} threads")

    if config.objective == "two-stage":
        half = replace(training, max_steps=-(-config.max_steps // 2))
        correction = student(Correction, half, flow, "correction", new=False).to(device)
        flm.train(correction, correction_loss(teacher), corpus, half, "correction",
                  lambda model, n, steps, seed: sample(model, n, 1, seed, delta=lambda model, known: corrected(
                      model, teacher, known)))
        if 0 < config.stop_after <= half.max_steps:
            return
        training = replace(training, max_steps=config.max_steps - half.max_steps,
                           stop_after=max(0, config.stop_after - half.max_steps))
        loss = regression_loss(correction.requires_grad_(False), teacher)
    else:
        loss = map_loss(config.objective, teacher)
    model = student(Transformer, training, flow, "fmlm", new=teacher is None).to(device)
    flm.train(model, loss, corpus, training, "fmlm", lambda model, n, steps, seed: sample(model, n, 1, seed))
    if not 0 < training.stop_after < training.max_steps:
        if teacher:
            flm.show("64 steps of the flow", model, flm.sample(shown, 8, 64, config.seed, guidance=config.teacher_guidance))
        for steps in (1, 2, 4):
            flm.show(f"{steps} step{'s' * (steps > 1)} of the map", model, sample(model, 8, steps, config.seed))


if __name__ == "__main__":
    sys.exit(guard(main, resumes=True))
