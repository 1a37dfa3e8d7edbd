"""Flow map language model (FMLM): distils a flow into a map that writes a text in one evaluation.

    python distill.py                                  # runs/sentences/flm.pt -> fmlm.pt beside it
    python distill.py --run-dir runs/my --teacher none # learn from the text, not the flow
    python distill.py --sample --run-dir runs/sentences --sample-steps 1 --num-samples 20
    torchrun --standalone --nproc_per_node=8 distill.py --run-dir runs/lm1b

The flow map X_{s,t} maps the state at time s to the state at time t of the same trajectory:

    X_{s,t}(x) = (1-t)/(1-s) x + (t-s)/(1-s) delta_{s,t}(x)

delta_{s,t}, the mean denoiser, is a weighted mean of the flow's denoisers D_r, s < r < t, along the
trajectory: one distribution over tokens per position. delta_{t,t} = D_t is learned from the flow,
and the semigroup property extends it to s < t. The network is that of the flow with a second time
input. One step from s = 0 to t = 1 writes a text. Paper: arXiv 2602.16813, v2. Settings that are
not given are those of the flow, except beta2 = 0.95, no dropout and PRESETS.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import flm
from data import UserError, readable

# ---------------------------------------------------------------------------------- 1. The map

def flow_map(model, state, probs, tau_s, tau_t):
    """X_{s,t}(x), (B, L, D), of states x at tau_s (B,), given probs = delta_{s,t}(x)."""
    s, t = times(model, tau_s, tau_t)
    return torch.lerp(state, model.clean(probs), (t - s) / (1 - s).clamp(min=1e-9))

def times(model, *taus):
    """t(tau) of each tau (B,), as (B, 1, 1)."""
    return [model.clock.t(tau)[:, None, None] for tau in taus]

def few_steps(delta, state, clock, steps, clean, noise, renoise=0.0):
    """Samples a flow map on a uniform grid of tau. Yields (tau, state, probs) of each step.

    A step from t to t' adds the share g = renoise of fresh noise. It maps the state to a later time
    t~ = t'/(t' + (1-t') sqrt(1-g^2)) and scales it by t'/t~, which leaves old noise of the size
    (1-t') sqrt(1-g^2). Then it adds g (1-t') noise(i). With the exact map, x_t' has the law of
    the flow for every g from 0 (no noise) to 1.
    """
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    for i, (tau, tau_next) in enumerate(zip(taus, taus[1:])):
        t, t_next = clock.t(tau), clock.t(tau_next)
        later = t_next / (t_next + (1 - t_next) * (1 - renoise**2) ** 0.5)
        probs = delta(state, tau.expand(len(state)), clock.tau(later).expand(len(state)))
        yield tau, state, probs
        if i + 1 == steps:
            return  # the state at t = 1 is clean(probs)
        state = state + (later - t) / (1 - t) * (clean(probs) - state)
        if renoise:
            state = t_next / later * state + renoise * (1 - t_next) * noise(i)

def sample(model, n, steps, seed, renoise=0.0, known=None):
    """Writes n texts in `steps` evaluations of the map: tokens (n, L).

    Starts from the same noise as flm.sample. known: token ids (L,) or (n, L), -1 where unknown.
    """
    def solve(rows, given):
        delta = mean_denoiser(model, given)
        noise = partial(model.noise, rows)
        generator = few_steps(delta, noise(), model.clock, steps, model.clean, noise, renoise)
        return flm.most_probable(model, flm.last(generator), given)

    return flm.in_batches(model, n, seed, solve, known)

def one_step(model, n, steps, seed):
    """The texts (n, L) of one step, whatever `steps` is. Shows the progress of a training."""
    return sample(model, n, 1, seed)

def mean_denoiser(model, known=None):
    """delta(state, tau_s, tau_t) -> probs (B, L, V)."""
    def delta(state, tau_s, tau_t):
        return model(state, tau_s, tau_t, known).softmax(-1)
    return delta

# ------------------------------------------------------------------------------------- 2. Loss

LATEST = 63 / 64  # the last tau before the data: the start of the last of 64 Euler steps
ENDS = 1 / 4  # share of the journeys that end at the data

def semigroup(delta, denoiser, model, state, tau_s, tau_t):
    """Target for delta_{s,t}: a journey in two halves, s to u and u to t, with u midway in tau.

    delta_{s,t}(x) = w delta_{s,u}(x) + (1-w) delta_{u,t}(X_{s,u}(x)),
    w = (1-t)(u-s) / ((1-u)(t-s)). `denoiser` is not needed; other objectives use it.

    A journey to t = 1 ends with one Euler step from tau_u = LATEST, as sampling a flow does:
    delta_{s,1}(x) = delta_{u,u}(X_{s,u}(x)). With u midway, w = 0 at t = 1, and the property would
    only say delta_{s,1}(x) = delta_{u,1}(X_{s,u}(x)), which also holds for a wrong end.
    """
    ends = tau_t == 1
    tau_u = torch.where(ends, LATEST, (tau_s + tau_t) / 2)
    s, u, t = times(model, tau_s, tau_u, tau_t)
    first = delta(state, tau_s, tau_u)
    second = flow_map(model, state, first, tau_s, tau_u)
    second = delta(second, tau_u, torch.where(ends, tau_u, tau_t))
    w = (1 - t) * (u - s) / ((1 - u) * (t - s))
    w = torch.where(t - s < 1e-6, 0.5, w)  # the limit
    w = torch.where(t == 1, 0.0, w)  # also if u rounds to 1
    return torch.lerp(second, first, w)

def draw_journeys(rows, uniform, latest=LATEST, ends=ENDS):
    """Times tau_s, tau_t (B,) of journeys. Half of them start at the noise, tau_s = 0.

    uniform (B,): numbers in [0, 1). Those above 1 - ends are journeys to the data, tau_t = 1. The
    others set the durations of journeys that end at `latest` or earlier.
    """
    to_data = uniform >= 1 - ends
    # with duration 0, journeys to the data start anywhere up to `latest`
    duration = torch.where(to_data, 0, latest * uniform / (1 - ends))
    start = (2 * rows.uniform((), uniform.device, "start") - 1).clamp(min=0)
    tau_s = (latest - duration) * start
    return tau_s, torch.where(to_data, 1, tau_s + duration)

def map_loss(teacher, objective=semigroup, latest=LATEST, ends=ENDS):
    """The loss of a flow map: the KL divergence from its target, in nats per unknown position.

    Even rows of a batch have s = t. Their target is the teacher's D_t, or the tokens if there is
    no teacher. Odd rows are journeys from s to t. Their target is `objective`, computed with the
    network itself and without gradient. With an exact teacher, the exact map has loss 0, except
    for journeys to t = 1. The tau that is returned is the time of even rows and sets the duration
    of odd rows.
    """
    def loss(model, tokens, rows):
        tau = rows.times(tokens.device)
        even = slice(rows.index.start % 2, None, 2)
        odd = slice(1 - rows.index.start % 2, None, 2)
        tau_s, tau_t = draw_journeys(rows, tau, latest, ends)
        tau_s[even] = tau_t[even] = tau[even]
        (s,) = times(model, tau_s)
        state = torch.lerp(model.noise(rows), model.clean(tokens), s)
        known = flm.draw_known(model, tokens, rows)

        # targets (B, L, V)
        with torch.no_grad():
            target = torch.zeros(*tokens.shape, model.V, device=tokens.device)
            target.scatter_(-1, tokens[..., None], 1.0)
            if teacher:
                denoiser = frozen_denoiser(teacher, known, even)
                target[even] = denoiser(state[even], tau_s[even])
            delta = mean_denoiser(model, known if known is None else known[odd])
            denoiser = frozen_denoiser(teacher or model, known, odd)
            target[odd] = objective(delta, denoiser, model, state[odd], tau_s[odd], tau_t[odd])
            entropy = torch.special.entr(target).sum(-1)

        logits = model(state, tau_s, tau_t, known)
        nats = flm.cross_entropy(logits, target) - entropy
        return flm.mean_unknown(nats, known), tau
    return loss

def frozen_denoiser(model, known, part):
    """denoiser(state, tau) -> D_t (B, L, V) for the rows `part` of a batch; known: its prompts."""
    known = known if known is None else known[part]
    two_times = model.time_t is not None  # D_t of a flow map is delta_{t,t}
    return lambda state, tau: model(state, tau, tau if two_times else None, known).softmax(-1)

# ----------------------------------------------------------------------------- 3. Command line

PRESETS = {"sentences": dict(max_steps=3500, lr=2.5e-3), "words": dict(max_steps=1000, lr=4e-3),
           "sotu": dict(max_steps=1000, lr=4e-3)}
SETTINGS = [f.name for f in flm.fields(flm.Config)]
INHERITED = [*SETTINGS[: SETTINGS.index("max_steps")], "clock", "sampler"]  # no flags: the flow's

@dataclass
class Config(flm.Config):
    """Settings of a distillation. The settings of data and network are the flow's."""

    teacher: str = flm.setting("flow", "none: the target for s = t is the text",
                               choices=("flow", "none"), group="distillation")
    renoise: float = flm.setting(0.0, "share of fresh noise between sampling steps", most=1)
    sample_steps: int = flm.setting(1, "network evaluations per text", least=1)

    def saved(self):
        return super().saved() | dict(teacher=self.teacher)

def join_run(argv, config_type, doc, kind, defaults, hidden=()):
    """Settings, flow and corpus to train a model `kind` in the run folder of a flow.

    The value of a setting is that in argv, else that in the dict defaults(flow's config), else that
    of the flow. With --sample, returns (config, None, None). Raises UserError.
    """
    given = flm.parse(argv, config_type, doc, (*INHERITED, *hidden))
    given.setdefault("run_dir", "runs/sentences")
    config = config_type(**given)
    flm.check(config)
    if config.sample:
        return config, None, None
    device = flm.setup(config)
    flow = flm.load(Path(config.run_dir, "flm.pt"), device, config.bf16)
    if flow.kind != "flm":
        raise UserError(f"{config.run_dir}/flm.pt: contains no flow; train one with flm.py")
    config = config_type(**(flow.config.saved() | defaults(flow.config) | given))
    config = flm.open_run(config, given, kind)
    corpus = flm.prepare_corpus(config)
    if flow.source not in ("", corpus.meta["source"]):  # a converted flow has no source
        raise UserError(f"--dataset {config.dataset}: its text changed after the flow was trained")
    flm.begin_run(config, kind)
    return config, flow, corpus

def main(argv):
    config, flow, corpus = join_run(
        argv, Config, __doc__, "fmlm", hidden=("temperature",),
        defaults=lambda flow: dict(beta2=0.95, dropout=0.0) | PRESETS.get(flow.dataset, {}))
    if config.sample:
        return flm.write_samples(config, "fmlm", partial(sample, renoise=config.renoise))
    model = flm.build(config, flow.tokenizer, flow.device, config.bf16, flm.FlowMap)
    model.clock = flow.clock
    teacher = flow if config.teacher == "flow" else None
    if teacher:
        with readable(flm.config_path(config.run_dir, "fmlm"), flm.NEW_RUN):
            model.load_state_dict(flow.state_dict(), strict=False)  # all but time_t
        model.embedding.requires_grad_(False)  # teacher and map have the same states
        if config.compile and flow.device.type == "cuda":
            teacher.compile()
    model = flm.train(model, map_loss(teacher), corpus, config, "fmlm", one_step)
    if teacher:
        flm.show("flow, steps: 64", flow, flm.sample(flow, 8, 64, config.seed))
    for steps in (1, 2, 4):
        flm.show(f"map, steps: {steps}", model, sample(model, 8, steps, config.seed))

if __name__ == "__main__":
    flm.run_command(main)
