"""Flow map language model (FMLM): distils a flow into a map that writes a text in one evaluation.

    python distill.py                                  # runs/sentences/flm.pt -> fmlm.pt beside it
    python distill.py --run-dir runs/my --teacher none # learn from the text; flm.pt gives settings
    python distill.py --sample --run-dir runs/sentences --sample-steps 1 --num-samples 20
    torchrun --standalone --nproc_per_node=8 distill.py --run-dir runs/lm1b

Solve the flow dy_r/dr = (D_r(y_r) - y_r)/(1-r) of the denoiser D_r, from y_s = x, to time t. The
result y_t is the flow map,

    X_{s,t}(x) = x + (t-s)/(1-s) (delta_{s,t}(x) - x).

This is an Euler step with delta_{s,t}, the mean denoiser, in place of D_s: the mean of D_r(y_r)
over s <= r <= t with weights 1/(1-r)^2, as d/dr (y_r/(1-r)) = D_r(y_r)/(1-r)^2 (integrate it; more
in notebooks/00_from_scratch.ipynb). So delta_{s,t} is a distribution over tokens per position, too.
In the limits, delta_{t,t} = D_t and delta_{s,1} = X_{s,1}, the text. Paper: arXiv 2602.16813, v2.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import flm
from data import UserError
from flm import setting

# ---------------------------------------------------------------------------------- 1. The map
def flow_map(model, state, probs, tau_s, tau_t):
    """X_{s,t}(x), (B, L, D), of states x at tau_s (B,), given probs = delta_{s,t}(x)."""
    s, t = times(model, tau_s, tau_t)
    share = (t - s) / (1 - s)
    return (1 - share) * state + share * model.clean(probs)

def times(model, *taus):
    """t(tau) of each tau (B,), as (B, 1, 1)."""
    return [model.clock.t(tau)[:, None, None] for tau in taus]

def few_steps(delta, state, clock, steps, clean, draw_noise=None, renoise=0.0):
    """Samples a flow map on a uniform grid of tau. Yields (tau, state, probs) of each step.

    delta(state, tau_s (B,), tau_t (B,)) -> probs. renoise = g > 0: the map leads beyond t_next = t'
    to `later`, where (t' / later) x_later = t' x1 + k (1-t') x0 with k = keep = sqrt(1-g^2). Fresh
    noise of size g (1-t') makes this a sample of x_t', as k^2 + g^2 = 1, if the map is exact (it
    is not trained for times between LATEST and 1).
    """
    B = len(state)
    taus = torch.linspace(0, 1, steps + 1, device=state.device)
    keep = (1 - renoise**2) ** 0.5
    for tau, tau_next in zip(taus, taus[1:]):
        t, t_next = clock.t(tau), clock.t(tau_next)
        later = t_next / (t_next + keep * (1 - t_next))  # t_next, if renoise = 0
        tau_later = clock.tau(later)
        probs = delta(state, tau.expand(B), tau_later.expand(B))
        yield tau, state, probs
        share = (later - t) / (1 - t)  # as in flow_map, but one time for all rows
        state = (1 - share) * state + share * clean(probs)
        if renoise:
            scale = t_next / later
            state = scale * state + renoise * (1 - t_next) * draw_noise()

@torch.no_grad()
def sample(model, n, steps, seed, temperature=1.0, known=None, renoise=0.0):
    """Writes n texts in `steps` evaluations of the map: tokens (n, L).

    Noise and arguments as in flm.sample; renoise as in few_steps.
    """
    texts = []
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.Generator().manual_seed(seed + 1)
    for known_rows in flm.batches(model, n, known):
        B = len(known_rows)
        state = model.noise(B, generator)
        delta = partial(flm.denoise, model, known_rows, temperature)
        draw_noise = partial(model.noise, B, fresh)
        yielded = few_steps(delta, state, model.clock, steps, model.clean, draw_noise, renoise)
        for _, _, probs in yielded:
            pass  # only the last probs are needed
        tokens = flm.most_probable(model, probs, known_rows)
        texts.append(tokens.cpu())
    return torch.cat(texts)

# ------------------------------------------------------------------------------------- 2. Loss
LATEST = 63 / 64  # last time of 64 steps. A journey (a pair s < t) ends at tau_t <= LATEST or at 1
ENDS = 1 / 4  # share of the journeys that lead to the data

def semigroup(delta, model, state, tau_s, tau_t):
    """Target for delta_{s,t}, probs (B, L, V), from two parts of the journey: s to u and u to t.

    delta_{s,t} is a mean over s <= r <= t, so it is a weighted mean of its two parts:
    delta_{s,t}(x) = w delta_{s,u}(x) + (1-w) delta_{u,t}(X_{s,u}(x)), where w is the integral of
    1/(1-r)^2 over s..u divided by that over s..t, (1-t)(u-s) / ((1-u)(t-s)). u: half-way in tau.

    For t = 1, w = 0: this says only that delta_{s,1} is constant along a solution, not what it is.
    There, tau_u is LATEST, and delta_{u,u} = D_u replaces delta_{u,1}: an Euler step to the data.
    """
    to_data = tau_t == 1
    tau_u = torch.where(to_data, LATEST, (tau_s + tau_t) / 2)
    s, u, t = times(model, tau_s, tau_u, tau_t)
    probs_su = delta(state, tau_s, tau_u)
    state_u = flow_map(model, state, probs_su, tau_s, tau_u)
    second_time = torch.where(to_data, tau_u, tau_t)  # delta_{u,u} for t = 1
    probs_ut = delta(state_u, tau_u, second_time)
    w = (1 - t) * (u - s) / ((1 - u) * (t - s))  # 0 for t = 1
    w = torch.where(t - s < 1e-6, 0.5, w)  # 0/0 as t -> s: u is then half-way in t, too
    return w * probs_su + (1 - w) * probs_ut

def draw_journeys(B, device, latest=LATEST, ends=ENDS):
    """Times tau_s < tau_t (B,). Half of the journeys start at tau_s = 0. A share `ends` leads to
    tau_t = 1. The durations tau_t - tau_s of the others are uniform, up to `latest`."""
    uniform = flm.uniform_times(B, device)  # values above 1 - ends: to the data
    to_data = uniform >= 1 - ends
    duration = latest * uniform / (1 - ends)
    duration = torch.where(to_data, 0, duration)  # so tau_s is uniform up to latest
    start = (2 * torch.rand(B, device=device) - 1).clamp(min=0)  # 0 with probability 1/2
    tau_s = start * (latest - duration)
    tau_t = torch.where(to_data, 1, tau_s + duration)
    return tau_s, tau_t

def map_loss(teacher, model, tokens, target=semigroup, draw=draw_journeys):
    """KL(target || delta_{s,t}) in nats per position: tokens (B, L) -> loss (B,), tau_s (B,).

    The first half of the rows have s = t. Their target is the teacher's D_t, or the tokens if there
    is no teacher. The others are journeys. Their target is the network's own, without gradient, so
    this loss does not measure quality. States as in flow_loss. More targets: extras/objectives.py.
    """
    B, device = len(tokens), tokens.device
    half = B // 2
    tau = flm.uniform_times(half, device)
    tau_s, tau_t = draw(B - half, device)
    tau_s = torch.cat([tau, tau_s])
    tau_t = torch.cat([tau, tau_t])
    (s,) = times(model, tau_s)
    x0 = model.noise(B)  # x0 W, (B, L, D)
    x1 = model.clean(tokens)
    state = (1 - s) * x0 + s * x1
    known = flm.draw_known(model, tokens)
    state = flm.insert_known(model, state, known)

    with torch.no_grad():
        if teacher:
            at_same_time = teacher(state[:half], tau).softmax(-1)
        else:
            at_same_time = F.one_hot(tokens[:half], model.V).float()
        delta = partial(flm.denoise, model, known[half:], 1.0)
        of_journeys = target(delta, model, state[half:], tau_s[half:], tau_t[half:])
        targets = torch.cat([at_same_time, of_journeys])
        entropy = torch.special.entr(targets).sum(-1)
    logits = model(state, tau_s, tau_t)
    nats = flm.cross_entropy(logits, targets) - entropy
    return nats.mean(1), tau_s

# ----------------------------------------------------------------------------- 3. Command line
SHORT = dict(max_steps=1000, lr=4e-3)
PRESETS = dict(sentences=dict(max_steps=3500, lr=2.5e-3), words=SHORT, sotu=SHORT)

@dataclass
class Config(flm.Config):
    """Settings of a distillation. Those of the network are the flow's, but without dropout."""

    teacher: str = setting("training", "flow", "none: learn from the text", ("flow", "none"))
    run_dir: str = setting("command", "runs/sentences", "folder of the flow")
    sample_steps: int = setting("command", 1, "network evaluations per text")
    renoise: float = setting("command", 0.0, "fresh noise between sampling steps, 0 to 1")

def follow_flow(config_type, given, path, presets, **defaults):
    """Prepares the training of a model beside flm.pt: its settings, flm.pt, device, corpus.

    The settings of the flow are replaced by defaults, by the preset of its text, by those of a
    resumed run at path, and by the command line, in this order. Raises UserError.
    """
    flow = flm.load_checkpoint(path.with_name("flm.pt"))
    settings = flow["config"] | defaults | presets.get(flow["config"]["dataset"], {})
    if given.get("resume") and path.exists():
        settings |= flm.load_checkpoint(path)["config"]
        names = {f.name for f in fields(config_type)}
        if settings.keys() - names or given.get("teacher") not in (None, settings.get("teacher")):
            raise UserError(f"{path}: resume it with the program and --teacher that trained it")
    config = config_type(**(settings | given))
    device, corpus = flm.open_run(config, path)
    same_tokens = corpus.tokenizer.content == flow["tokenizer"]
    if not same_tokens or flow["source"] not in ("", corpus.meta["source"]):  # "": not known
        raise UserError(f"--dataset {config.dataset}: not the text of the flow; pass that text")
    return config, flow, device, corpus

def main(argv):
    given = flm.parse(argv, Config, __doc__, groups=("training", "command"))
    path = Path(given.get("run_dir", Config.run_dir), "fmlm.pt")
    if given.get("sample"):
        config = Config(**given)
        return flm.write_samples(config, path, sample, renoise=config.renoise)
    config, flow, device, corpus = follow_flow(Config, given, path, PRESETS, beta2=0.95, dropout=0)
    if config.micro_batch_size == 1 or config.batch_size == flm.world():
        raise UserError("--micro-batch-size, --batch-size: a map needs 2 rows per process or more")
    model = flm.build(config, corpus.tokenizer, device, config.bf16, flm.FlowMap)
    teacher = None
    if config.teacher == "flow":
        teacher = flm.load(path.with_name("flm.pt"), device, config.bf16)
        model.load_state_dict(flow["average"], strict=False)  # all but time_t
        model.embedding.requires_grad_(False)  # teacher and map have the same states
    loss = partial(map_loss, teacher)
    model = flm.train(model, loss, corpus, config, path, sample)
    for steps in (1, 2, 4):
        texts = flm.to_lines(model, sample(model, 8, steps, config.seed))
        flm.report(f"map, steps: {steps}", *texts, final=True)

if __name__ == "__main__":
    flm.run(main)
