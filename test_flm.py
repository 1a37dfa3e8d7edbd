"""Each test compares a number with an analytic or independent value; tolerances are derived.

    pytest test_flm.py
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import distill
import flm
from data import UserError

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SMALL = dict(depth=2, width=16, heads=2, cond_width=8, seq_len=5, dropout=0.0)
TINY = ("--depth 2 --width 16 --heads 2 --batch-size 8 --warmup 0 --device cpu --dataset a.txt "
        "--tokenizer chars --no-packing --seq-len 12")
TEXT = "".join(f"{word} {i}\n" for i in range(100) for word in ("ab", "ba", "abba"))
P = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
TOKENS = torch.arange(5)[:, None], P  # texts of one token, and their probabilities
PHRASES = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.5, 0.5])  # "new york", "san diego"

@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a small text; runs and token files are written to it."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    return tmp_path

def network(V, make=flm.Transformer, dtype=torch.float32, **settings):
    """A small network with random weights in every layer."""
    model = make(flm.Config(**(SMALL | settings)), V)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype)

def all_rows(n, seed=0, step=0):
    return flm.Rows(seed, step, range(n), n)

def command(program, line, processes=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [*(torchrun if processes else []), str(HERE / program), *shlex.split(line)]
    return subprocess.run([sys.executable, *arguments], timeout=120, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

def run(program, line):
    program.main(shlex.split(line))

class Source(torch.nn.Module):
    """The flow of a source of texts (n, L) with probabilities p (n,), without a network.

    By Bayes' rule, the log posterior of a text is log p plus the sum of (t x - t^2/2) / (1-t)^2
    over its tokens. With E, states are x E and x is found by the pseudo-inverse. With two times,
    it is the flow map, by 64 Euler steps; this is for states x only.
    """

    device, time_t, takes_prompts = CPU, None, True

    def __init__(self, texts, p, E=None):
        super().__init__()
        self.log_p, self.one_hot = p.log(), F.one_hot(texts).to(p.dtype)
        _, L, self.V = self.one_hot.shape
        self.embedding = torch.eye(self.V, dtype=p.dtype) if E is None else E
        self.inverse = torch.linalg.pinv(self.embedding)
        self.clock = flm.Clock(self.V)
        self.config = flm.Config(seq_len=L, width=self.embedding.shape[1])

    def factor(self):
        return torch.linalg.cholesky(self.embedding.T @ self.embedding)

    def noise(self, rows, *purpose):
        return rows.normal((self.config.seq_len, self.V), CPU, *purpose) @ self.embedding

    def clean(self, x):
        return (x if x.is_floating_point() else F.one_hot(x, self.V).float()) @ self.embedding

    def denoiser(self, state, tau, tau_t=None, known=None):
        """E[x1 | x_t], (B, L, V)."""
        t, norms = self.clock.t(tau)[:, None, None], (self.embedding @ self.inverse).diag()
        evidence = (t * state @ self.inverse - t**2 / 2 * norms) / (1 - t).clamp(min=1e-3) ** 2
        if known is not None:
            sure = 1000.0 * F.one_hot(known.clamp(min=0), self.V)
            evidence = torch.where((known < 0)[..., None], evidence, sure)
        score = self.log_p + torch.einsum("blv,nlv->bn", evidence, self.one_hot)
        return torch.einsum("bn,nlv->blv", score.softmax(-1), self.one_hot)

    def forward(self, state, tau_s, tau_t=None, known=None):
        if tau_t is None:
            return self.denoiser(state, tau_s, None, known).clamp(min=1e-30).log()
        x, taus = state, torch.lerp(tau_s, tau_t, torch.linspace(0, 1, 65)[:, None])
        for tau, tau_next in zip(taus, taus[1:]):
            t, t_next = distill.times(self, tau, tau_next)
            x = x + (t_next - t) / (1 - t) * (self.denoiser(x, tau, None, known) - x)
        (s,) = distill.times(self, tau_s)
        return (((1 - s) * x - (1 - t_next) * state) / (t_next - s)).clamp(min=0).log()

def total_variation(tokens, p):
    found = tokens.flatten().bincount(minlength=len(p)) / tokens.numel()
    return (found - p).abs().sum().item() / 2

# --------------------------------------------------------------------------------------- clock

def test_clock_has_the_closed_form_for_two_tokens():
    """V = 2: P(right) = Phi(m / sqrt 2) with m = t/(1-t). The quadrature is exact to 1e-14."""
    t = torch.linspace(0, 0.95, 50, dtype=torch.float64)
    right = torch.special.ndtr(t / (1 - t) / math.sqrt(2))
    assert torch.allclose(flm.decodability(t, 2), 2 * right - 1, atol=1e-13, rtol=0)

@pytest.mark.parametrize("V, expected", [
    (27, [0.1057539, 0.4256657, 0.6694440, 0.7751157, 0.8230163]),
    (50258, [0.6464080, 0.7437947, 0.8087472, 0.8476519, 0.8694999]),
])
def test_clock_inverts_to_independently_computed_times(V, expected):
    """Times from 20-digit quadrature and root finding. Linear interpolation errs by at most
    h^2 |t''/t'^2| / 8 = 9e-7 at h = 1/4096; float32 adds 1e-7."""
    clock = flm.Clock(V)
    t = clock.t(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]))
    assert (t - torch.tensor(expected)).abs().max() < 1.5e-6
    assert clock.t(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    tau = torch.linspace(0, 0.999, 200)
    assert (clock.tau(clock.t(tau)) - tau).abs().max() < 1e-6

def test_an_adaptive_clock_spends_half_of_its_time_where_the_loss_falls():
    """The loss falls from 3 to 1, linearly in the paper's tau, and is constant after tau = 1/2.

    Then the new time is (tau + 2 tau) / 2 in the first half and (tau + 1) / 2 in the second, to the
    error of linear interpolation between slices. The time input remains the paper's tau.
    """
    clock, paper = flm.Clock(27), flm.Clock(27)
    for _ in range(4):
        middle = clock.paper_tau((torch.arange(10) + 0.5) / 10)
        clock.sums[:] = torch.stack([3 - 4 * middle.clamp(max=0.5), torch.ones(10)])
        clock.respace()
        for tau, new in ((0, 0), (0.2, 0.3), (0.45, 0.675), (0.6, 0.8), (0.9, 0.95), (1, 1)):
            tau, new = torch.tensor([float(tau)]), torch.tensor([float(new)])
            assert abs(clock.tau(paper.t(tau)) - new) < 0.02
            assert abs(clock.paper_tau(clock.tau(paper.t(tau))) - tau) < 1e-5
        assert clock.t(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    clock.respace()  # does nothing without a loss in every slice
    assert abs(clock.paper_tau(torch.tensor(0.3)) - 0.2) < 0.02 and not clock.sums.any()
    sums = clock.by_slice(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0, 0.52, 1]))
    assert sums.sum() == 15 and sums[:, [0, 5, 9]].tolist() == [[3, 4, 5], [1, 1, 1]]

def test_held_out_losses_are_those_of_the_papers_times():
    """Also of an adapted clock, which stays adapted. Here, the loss is t."""
    model = network(27)
    corpus = SimpleNamespace(rows=lambda split: 4,
                             batch=lambda split, rows: torch.zeros(len(rows), 5))
    def by_tau():
        return flm.estimate_loss(
            model, lambda model, tokens, rows: [model.clock.t(rows.times(CPU))], corpus, 4)
    expected, model.clock.nodes = by_tau(), model.clock.nodes.sqrt()
    adapted = model.clock.nodes.clone()
    assert by_tau() == expected and torch.equal(model.clock.nodes, adapted)

def test_euler_converges_to_the_source_as_theory_predicts():
    """Total variation with the exact denoiser; the figures are from 2,000,000 paths. With 200,000,
    the standard error is .001: 4 of them. One step always returns the most frequent token."""
    source, noise = Source(*TOKENS), torch.randn(200_000, 1, 5)
    for steps, expected in [(1, 0.60), (2, 0.0945), (4, 0.032), (8, 0.013), (16, 0.0055)]:
        tokens = flm.last(flm.euler(source.denoiser, noise, source.clock, steps)).argmax(-1)
        assert abs(total_variation(tokens, P) - expected) < (0.004 if steps > 1 else 1e-6), steps

def test_euler_is_of_first_order():
    """N uniform steps in t up to .8: doubling N halves the distance to a fine solution (2 +- .1;
    the error of the fine one, 1/32 of the smallest measured, changes the last ratio to 2.03)."""
    class Uniform(torch.nn.Module):
        t = staticmethod(lambda tau: 0.8 * tau)
    source, end = Source(TOKENS[0], P.double()), {}
    source.clock, noise = Uniform(), torch.randn(500, 1, 5, dtype=torch.float64)
    for steps in (20, 40, 80, 160, 5120):
        *_, (tau, state, probs) = flm.euler(source.denoiser, noise, source.clock, steps)
        t = source.clock.t(tau)
        end[steps] = state + (0.8 - t) / (1 - t) * (probs - state)
    errors = [(end[n] - end[5120]).abs().mean() for n in (20, 40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(coarse / fine - 2) < 0.1

def test_the_exact_flow_never_mixes_two_phrases():
    """0 of 2000 are mixed, and each phrase has 45 to 55 % (4.5 standard errors of .011). Drawing
    each token from its marginal mixes half of them (.5 +- .05)."""
    source, noise = Source(*PHRASES), torch.randn(2000, 2, 4)
    first, second = flm.last(flm.euler(source.denoiser, noise, source.clock, 256)).argmax(-1).T
    assert torch.equal(second, first + 1) and 0.45 < (first == 0).float().mean() < 0.55
    marginals = source.denoiser(noise, torch.zeros(2000)).flatten(0, 1)
    first, second = marginals.multinomial(1).view(2000, 2).T
    assert abs((second != first + 1).float().mean() - 0.5) < 0.05

@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_the_ancestral_sampler_has_the_law_of_the_source_at_any_step_count(steps):
    """Expected total variation of 200,000 exact draws over 5 tokens: .0016; bound .004."""
    source, n = Source(*TOKENS), 200_000
    tokens = flm.last(flm.ancestral(
        source.denoiser, torch.randn(n, 1, 5), source.clock, steps, source.clean,
        lambda i: torch.randn(n, 1, 5), lambda i: torch.rand(n, 1)))
    assert total_variation(tokens, P) < 0.004

def test_ancestral_states_have_the_law_of_x_t():
    """Given the token, x_t is N(t x1, (1-t)^2 I): mean and variance of 20,000 states over 5
    coordinates, 5 standard errors each, at every step."""
    clock, n = flm.Clock(5), 20_000
    token = F.one_hot(torch.zeros(n, 1, dtype=torch.long), 5).float()
    steps = flm.ancestral(lambda *_: token, torch.randn(n, 1, 5), clock, 6, lambda _: token,
                          lambda i: torch.randn(n, 1, 5), lambda i: torch.rand(n, 1))
    for tau, state, _ in steps:
        t = clock.t(tau)
        white = ((state - t * token) / (1 - t)).flatten(1)
        assert white.mean(0).abs().max() < 5 / n**0.5
        assert (white.var(0) - 1).abs().max() < 5 * (2 / n) ** 0.5

def test_samplers_in_v_and_in_d_dimensions_agree():
    """The network sees x_t only through x_t E, and each step is linear: float64 rounding."""
    model = network(23, dtype=torch.float64)
    eps = torch.randn(3, 5, 23, dtype=torch.float64)
    def in_d(state, tau, _):
        return model(state, tau).softmax(-1)
    def in_v(x, tau, _):
        return model(x @ model.embedding, tau).softmax(-1)
    model.logits = lambda x: model.head(x)  # flm's logits are float32
    small = flm.last(flm.euler(in_d, eps @ model.embedding, model.clock, 16, model.clean))
    large = flm.last(flm.euler(in_v, eps, model.clock, 16))
    assert (small - large).abs().max() < 1e-12 and small.std() > 0.01

def test_the_length_of_a_padded_text_is_chosen_first():
    """1000 random rows, against the product of probabilities of every length (float64). With
    packing, the text is the argmax. A known end token fixes the length."""
    model, end, n, L = network(4, packing=False), 2, 1000, 5
    model.tokenizer = SimpleNamespace(end=end)
    probs = (3 * torch.randn(n, L, 4)).softmax(-1)
    texts, p = flm.most_probable(model, probs), probs[..., end].double()
    for length in range(L):
        inside = torch.arange(L) < length
        P = [torch.where(torch.arange(L) < k, 1 - p, p).prod(1) for k in range(L)]
        rows = torch.stack(P).argmax(0) == length
        words = probs[rows].index_fill(-1, torch.tensor(end), -1).argmax(-1)
        assert rows.any() and torch.equal(texts[rows], torch.where(inside, words, end))
    known = torch.full((n, L), -1)
    known[:, 1], known[:, 3:] = 0, end
    lengths = (flm.most_probable(model, probs, known) != end).sum(1)
    assert torch.equal(lengths, 2 + (p[:, 2] < 0.5))
    model.config.packing = True
    assert torch.equal(flm.most_probable(model, probs), probs.argmax(-1))

# ------------------------------------------------------------------------------ noise and loss

@pytest.mark.parametrize("V, D", [(40, 6), (6, 6)])
def test_noise_has_the_covariance_of_one_hot_noise(V, D):
    """cov = E^T E. An entry of a Gaussian sample covariance has the standard error
    sqrt((C_ij^2 + C_ii C_jj) / n): 5 of them. V <= D uses another formula with the same law."""
    model = network(V, width=D, heads=1)
    h = model.noise(all_rows(5000)).detach().flatten(0, 1)
    C = (model.embedding.T @ model.embedding).detach()
    error = ((C**2 + C.diag()[:, None] * C.diag()) / len(h)).sqrt()
    assert ((h.T @ h / len(h) - C).abs() / error).max() < 5
    assert (h.mean(0).abs() / (C.diag() / len(h)).sqrt()).max() < 5

def test_the_gradient_of_the_factor_is_autograds():
    """factor() differentiates one of the two factors of E^T E and doubles it: float64 rounding."""
    model = network(40, width=6, heads=1, dtype=torch.float64)
    E, weight = model.embedding, torch.randn(6, 6, dtype=torch.float64)
    plain = torch.linalg.cholesky(E.T @ E)
    ours, expected = (torch.autograd.grad((factor * weight).sum(), E)[0]
                      for factor in (model.factor(), plain))
    assert torch.allclose(model.factor(), plain) and torch.allclose(ours, expected, rtol=1e-9)

def test_the_embedding_has_the_gradient_of_one_hot_noise():
    """The expected gradient of E through z chol(E^T E)^T equals that through eps E. 400 batches:
    the largest of 96 standardised differences stays below 4.5 (chance 7e-4). Without the gradient
    of the factor, it does not."""
    V, D, n = 12, 8, 400
    model = network(V, width=D, seq_len=4, packing=True).eval()
    E, tokens, tau = model.embedding, torch.randint(V, (16, 4)), (torch.arange(16) + 0.5) / 16
    t = model.clock.t(tau)[:, None, None]

    def gradients(noise):
        found = []
        for _ in range(n):
            state = torch.lerp(noise(), model.clean(tokens), t)
            loss = flm.cross_entropy(model(state, tau), tokens).mean()
            found.append(torch.autograd.grad(loss, E)[0])
        found = torch.stack(found)
        return found.mean(0), found.var(0) / n

    mean, var = gradients(lambda: torch.randn(16, 4, V) @ E)
    for factor, same in ((model.factor, True), (lambda: model.factor().detach(), False)):
        mean2, var2 = gradients(lambda factor=factor: torch.randn(16, 4, D) @ factor().T)
        assert (((mean2 - mean) / (var + var2).sqrt()).abs().max() < 4.5) == same

def test_a_singular_embedding_gives_nan():
    """cholesky_ex returns a finite wrong factor for E^T E of rank 3 in 6 dimensions."""
    model = network(40, width=6, heads=1)
    model.embedding.data[:, 3:] = 0
    assert model.noise(all_rows(2)).isnan().all()

def test_an_untrained_network_has_the_loss_log_v():
    model = flm.Transformer(flm.Config(**SMALL), 33)
    nats, _ = flm.flow_loss(model, torch.randint(33, (16, 5)), all_rows(16))
    assert torch.allclose(nats, torch.full((16,), math.log(33)), atol=1e-5)

def test_the_loss_of_the_exact_denoiser_is_the_conditional_entropy():
    """flow_loss with the oracle in place of the network, V = 5 <= D: its mean over 40,000 rows
    equals E[-log D_t(x_t)[x1]] from independent draws, within 4 standard errors of both."""
    n, model = 40_000, Source(*TOKENS)
    tokens = P.multinomial(n, replacement=True)[:, None]
    ours, _ = flm.flow_loss(model, tokens, all_rows(n))
    t = model.clock.t(torch.rand(n))[:, None]
    x = (1 - t) * torch.randn(n, 5) + t * F.one_hot(tokens[:, 0], 5)
    log_posterior = P.log() - ((x[:, None] - t[..., None] * torch.eye(5)) ** 2).sum(-1) / (
        2 * (1 - t) ** 2)
    theirs = -log_posterior.log_softmax(-1).gather(1, tokens)
    error = ((ours.var() + theirs.var()) / n).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error

def test_rows_are_stratified_and_independent_of_the_batch_around_them():
    rows, part = all_rows(12, 7, 3), flm.Rows(7, 3, range(5, 9), 12)
    assert (rows.times(CPU) * 12).long().tolist() == list(range(12))
    assert torch.equal(rows.times(CPU)[5:9], part.times(CPU))
    noise = rows.normal((4, 5), CPU)
    assert torch.equal(noise[5:9], part.normal((4, 5), CPU))
    for other in (all_rows(12, 8, 3), all_rows(12, 7, 4)):
        assert not (other.normal((4, 5), CPU) == noise).any()
    assert not (rows.normal((4, 5), CPU, "other") == noise).any()

# ------------------------------------------------------------------------------------- network

def test_logits_and_attention_scores_are_capped():
    """30 tanh(z/30), where z is the uncapped output; attention against the fused kernel."""
    model = network(11)
    model.head.weight.data *= 100
    state, tau = model.noise(all_rows(3)), torch.tensor([0.3, 0.6, 0.99])
    capped = model(state, tau)
    model.config.logit_cap = 0.0
    z = model(state, tau)
    assert torch.allclose(capped, 30 * torch.tanh(z / 30), atol=1e-4) and z.abs().max() > 60
    block, (q, k, v) = model.blocks[0], torch.randn(3, 2, 3, 12, 4)
    assert torch.allclose(block.attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    block.cap = 1.0
    scores = torch.tanh(q @ k.mT / 2)
    assert torch.allclose(block.attend(q, k, v), scores.softmax(-1) @ v, atol=1e-5)

def test_attention_depends_on_relative_positions():
    """The rotated score of q at i and k at j equals that at i+3 and j+3."""
    model = network(5, seq_len=12)
    q, k = torch.randn(2, 1, 1, 1, 1, 8)
    def score(i, j):
        a, b = (flm.rotate(x, model.cos[at : at + 1], model.sin[at : at + 1])
                for x, at in ((q, i), (k, j)))
        return (a * b).sum()
    assert torch.allclose(score(2, 7), score(5, 10), atol=1e-5)
    assert not torch.allclose(score(2, 7), score(2, 8), atol=1e-3)

def test_muon_is_torchs_muon_in_float32():
    """Three steps. torch's Newton-Schulz runs in bfloat16 (2^-8): 5 % of the update is allowed."""
    start = torch.randn(24, 16)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = flm.Muon([ours], lr=0.1), torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
    singular = torch.linalg.svdvals(flm.orthogonalise(torch.randn(3, 24, 16)))
    assert 0.5 < singular.min() and singular.max() < 1.3

def test_the_embedding_has_its_own_learning_rate(folder, monkeypatch):
    """In step 1, the head is zero and E has no gradient. By AdamW's formulas, its first gradient in
    step 2 changes it by m / sqrt(v) = (.1 / .19) / sqrt(.001 / .001999) of its learning rate."""
    monkeypatch.setitem(flm.PRESETS["a text file"], "embedding_lr", 0.25)
    for lr in (0.0, 0.01):
        run(flm, f"{TINY} --max-steps 2 --decay 0 --ema 0 --lr {lr} --run-dir {lr}")
    before, after = (flm.load(f"{name}/flm.pt").embedding for name in ("0.0", "0.01"))
    expected = 0.25 * 0.01 * 0.1 / 0.19 / math.sqrt(0.001 / 0.001999)
    assert abs((after - before).abs().max() / expected - 1) < 1e-3

def test_the_learning_rate_rises_stays_and_falls():
    config = flm.Config(lr=1.0, warmup=10, decay=0.5, max_steps=100)
    rates = [round(flm.get_lr(s, config), 6) for s in (0, 4, 9, 30, 50, 75, 99)]
    assert rates == [0.1, 0.5, 1, 1, 1, 0.5, 0.02]

# ------------------------------------------------------------------------------------ flow map

class ExactFlow(Source):
    """Flow and exact map of one position with two tokens. p = P(token 1).

    y = x[1] - x[0] has at time t the distribution F_t(y) = sum_k p_k Phi((y -+ t)/(sqrt 2 (1-t))).
    A flow in one dimension keeps quantiles: y_t = F_t^-1(F_s(y_s)), found by bisection. delta
    follows from X_{s,t}. States are x E with E (2, 3). theta is added to the logits that are
    trained: its gradient is zero where the target is the map itself. coarse: delta_{s,t} = D_s,
    which is one Euler step. wrong: the other token at t = 1.
    """

    def __init__(self, p=0.3, rows=1, coarse=False, wrong=False):
        E = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.4, 1.1]])
        super().__init__(torch.tensor([[0], [1]]), torch.tensor([1 - p, p]), E)
        self.p, self.coarse, self.wrong = p, coarse, wrong
        self.theta = torch.nn.Parameter(torch.zeros(rows, 1, 2))

    def difference(self, state):
        x = state.double() @ torch.linalg.pinv(self.embedding.double())
        return x[..., 1] - x[..., 0]

    def law(self, y, t):
        scale = math.sqrt(2) * (1 - t).clamp(min=1e-9)
        return sum(p * torch.special.ndtr(x / scale)
                   for p, x in ((self.p, y - t), (1 - self.p, y + t)))

    def exact(self, state, tau_s, tau_t=None):
        s, y = self.clock.t(tau_s).double()[:, None], self.difference(state)
        d = torch.sigmoid(math.log(self.p / (1 - self.p)) + s / (1 - s).clamp(min=1e-4) ** 2 * y)
        if tau_t is not None and not self.coarse:
            t, quantile = self.clock.t(tau_t).double()[:, None], self.law(y, s)
            low, high = torch.full_like(y, -25.0), torch.full_like(y, 25.0)
            for _ in range(62):
                middle = (low + high) / 2
                below = self.law(middle, t) < quantile
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            moved = ((1 - s) * low - (1 - t) * y) / (t - s).clamp(min=1e-12)
            d = torch.where(t - s < 1e-9, d, (1 + moved) / 2)
            d = torch.where((t == 1) & self.wrong, 1 - d, d)
        return torch.stack([1 - d, d], -1).clamp(min=1e-30)

    def forward(self, state, tau_s, tau_t=None, known=None):
        logits = self.exact(state, tau_s, tau_t).log().float()
        return logits + self.theta if torch.is_grad_enabled() else logits

def gradients(loss, model):
    """The largest gradient of the output in each row, and the mean absolute loss."""
    torch.manual_seed(0)
    rows = len(model.theta)
    tokens = (torch.rand(rows, 1) < model.p).long()
    value, _ = loss(model, tokens, all_rows(rows))
    value.sum().backward()
    return model.theta.grad.abs().amax((1, 2)), value.abs().mean()

def test_the_true_map_is_the_fixed_point_of_the_semigroup_loss():
    """Float32 states (6e-8) are multiplied by at most t/(1-t)^2 < 60, twice: gradients below 1e-5.
    One of 512 rows may be so near the edge between the tokens that its target flips. The loss,
    a divergence, is 0. One Euler step instead of the map is not a fixed point.

    The target of journeys to the data is D at tau = 63/64. Its argmax is wrong with probability
    1/128 (V = 2): the true map errs by at most twice that in 256 rows. Another end errs by 1.
    """
    loss = distill.map_loss(ExactFlow(), ends=0)
    gradient, value = gradients(loss, ExactFlow(rows=512))
    assert (gradient > 1e-5).sum() <= 1 and value < 1e-5
    assert (gradients(loss, ExactFlow(rows=512, coarse=True))[0] > 0.01).sum() > 100
    loss = distill.map_loss(ExactFlow(), ends=1)
    assert gradients(loss, ExactFlow(rows=512))[0].sum() < 2 * 256 / 128
    assert gradients(loss, ExactFlow(rows=512, wrong=True))[0].sum() > 0.9 * 256

def test_the_semigroup_weight_is_a_share():
    """First halves of token 0 and second halves of token 1 give the target (w, 1 - w): w as in
    float64 to 1e-6; 0 at t = 1; 1/2 where t - s < 1e-6."""
    model = type("Model", (), dict(clock=flm.Clock(27), clean=staticmethod(lambda probs: probs)))
    tau_s = torch.linspace(0, 0.9999, 300)
    for share in (0.0, 1e-7, 1e-3, 0.3, 1.0):
        tau_t = torch.lerp(tau_s, torch.ones(()), share)
        def delta(state, a, b, tau_s=tau_s):
            token = torch.full((300, 1), 0 if a is tau_s else 1)
            return F.one_hot(token, 2).float()
        target = distill.semigroup(delta, None, model, torch.zeros(300, 1, 2), tau_s, tau_t)
        w = target[:, 0, 0]
        s, u, t = (model.clock.t(x).double() for x in (tau_s, (tau_s + tau_t) / 2, tau_t))
        exact = torch.where(t - s < 1e-6, 0.5, (1 - t) * (u - s) / ((1 - u) * (t - s)))
        assert w.min() >= 0 and w.max() <= 1 and (w - exact).abs().max() < 1e-6
        assert torch.allclose(target.sum(-1), torch.ones(300, 1), atol=1e-6)
        assert (w == {0.0: 0.5, 1.0: 0.0}.get(share, w)).all()

def test_a_map_starts_as_its_flow_and_is_the_identity_from_t_to_t():
    """And its end at t = 1 has its probabilities."""
    flow, tau = network(11), torch.tensor([0.0, 0.4, 0.999])
    model, state = flm.FlowMap(flow.config, 11), flow.noise(all_rows(3))
    missing = model.load_state_dict(flow.state_dict(), strict=False)
    assert all(name.startswith("time_t") for name in missing.missing_keys)
    assert torch.equal(model(state, tau, torch.ones(3)), flow(state, tau))
    model = network(11, flm.FlowMap)
    probs = model(state, tau, tau).softmax(-1)
    assert torch.equal(distill.flow_map(model, state, probs, tau, tau), state)
    end = distill.flow_map(model, state, probs, tau, torch.ones(3))
    assert torch.equal(end, model.clean(probs))

@pytest.mark.parametrize("renoise", [0.0, 0.5, 1.0])
def test_few_steps_of_the_exact_map_keep_the_law(renoise):
    """The Kolmogorov distance of 100,000 states to F_t stays below 1.95 / sqrt(n) (chance 1e-3)
    at every step, and token 1 has frequency p within 4 standard errors."""
    n, model = 100_000, ExactFlow()
    noise = partial(model.noise, all_rows(n))
    steps = distill.few_steps(distill.mean_denoiser(model), noise(), model.clock, 4, model.clean,
                              noise, renoise)
    with torch.no_grad():
        for tau, state, probs in steps:  # noqa: B007
            y = model.difference(state).flatten().sort()[0]
            uniform = (torch.arange(n) + 0.5) / n
            distance = (model.law(y, model.clock.t(tau).double()) - uniform).abs().max()
            assert distance * math.sqrt(n) < 1.95
    assert abs(probs[..., 1].mean() - model.p) < 4 * math.sqrt(model.p * (1 - model.p) / n)

def test_without_fresh_noise_the_map_sampler_is_euler():
    source, noise = Source(*PHRASES), torch.randn(50, 2, 4)
    arguments = source.denoiser, noise, source.clock, 4, source.clean
    ours = flm.last(distill.few_steps(*arguments, None))
    assert torch.allclose(ours, flm.last(flm.euler(*arguments)), atol=1e-6)

def test_one_step_of_a_trained_map_does_not_mix_two_phrases():
    """At most 1 % of 2000 noises give "new diego" or "san york"; each phrase has 45 to 55 % (4.5
    standard errors). The exact flow teaches a new network in 800 steps."""
    config = flm.Config(seq_len=2, width=32, heads=2, depth=2, cond_width=16, dropout=0.0, lr=0.01,
                        optimizer="muon", max_steps=800, warmup=20, decay=1.0, time_scale=100.0,
                        packing=False)
    model = flm.FlowMap(config, 4)
    model.embedding.requires_grad_(False)
    loss = distill.map_loss(Source(*PHRASES, model.embedding.data))
    optimizers = flm.make_optimizers(model, config)
    for step in range(config.max_steps):
        tokens = PHRASES[0][torch.randint(2, (256,))]
        loss(model, tokens, all_rows(256, step=step))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = flm.get_lr(step, config)
            optimizer.step()
            optimizer.zero_grad()
    config.packing = True  # these rows have no end tokens
    first, second = distill.sample(model, 2000, 1, 0).T
    assert (second != first + 1).float().mean() <= 0.01
    assert 0.45 < (first == 0).float().mean() < 0.55

# ------------------------------------------------------------------------------------- prompts

def test_prompts_are_prefixes_or_random_positions_and_never_everything():
    """6000 rows of 10 tokens with condition_prob .6: the share of rows with a prompt is .6 times
    P(non-empty): 9/10 for a prefix ceil(10 a) > 0 always, so .6 within 4 standard errors (.0063)
    plus the scattered rows that select nothing, E[(1-a)^10] = 1/11 of their half."""
    model = network(11, seq_len=10, condition_prob=0.6).train()
    tokens = torch.randint(11, (6000, 10))
    known = flm.draw_known(model, tokens, all_rows(6000))
    given = known >= 0
    assert torch.equal(known[given], tokens[given]) and not given.all(1).any()
    assert abs(given.any(1).float().mean() - 0.6 * (1 - 0.5 / 11)) < 4 * 0.0063
    prefix = (given.int().diff(dim=1) <= 0).all(1) & given[:, 0]
    assert 0.25 < prefix.float().mean() < 0.4
    part = flm.draw_known(model, tokens[70:90], flm.Rows(0, 0, range(70, 90), 6000))
    assert torch.equal(part, known[70:90])
    assert flm.draw_known(model.eval(), tokens, all_rows(6000)) is None

def test_known_tokens_replace_their_state_and_have_no_loss():
    model = network(11, condition_prob=0.5).train()
    tokens = torch.randint(11, (64, 5))
    rows = all_rows(64)
    known, tau = flm.draw_known(model, tokens, rows), rows.times(CPU)
    state = model.noise(rows)
    other = torch.where((known < 0)[..., None], state, 3 * state + 1)
    logits = model(state, tau, known=known)
    assert torch.equal(logits, model(other, tau, known=known))
    assert not torch.allclose(logits, model(state, tau))
    t = model.clock.t(tau)[:, None, None]
    nats = F.cross_entropy(model(torch.lerp(state, model.clean(tokens), t), tau, known=known).mT,
                           tokens, reduction="none")
    expected = torch.stack([row[k < 0].mean() for row, k in zip(nats, known)])
    assert torch.allclose(flm.flow_loss(model, tokens, rows)[0], expected, atol=1e-5)

PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3)), torch.tensor(
    [0.25, 0.05, 0.10, 0.02, 0.20, 0.03, 0.15, 0.10, 0.10])

@pytest.mark.parametrize("sampler, steps", [
    (flm.sample, 64), (partial(flm.sample, sampler="ancestral"), 64), (distill.sample, 1),
    (distill.sample, 2)])
@pytest.mark.parametrize("known", [[1, -1], [-1, 2], [-1, -1]])
def test_texts_have_the_conditional_law_given_the_known_tokens(sampler, steps, known):
    """4 binomial standard errors, and .005 for the 64 steps."""
    n = 20_000 if sampler in (flm.sample, distill.sample) else 5_000
    known = torch.tensor(known)
    texts = sampler(Source(*PAIRS), n, steps, 0, known=known)
    found = (3 * texts[:, 0] + texts[:, 1]).bincount(minlength=9) / n
    expected = PAIRS[1] * ((known < 0) | (PAIRS[0] == known)).all(1)
    expected /= expected.sum()
    assert (found - expected).abs().max() < 4 * 0.5 / n**0.5 + 0.005
    assert (found[expected == 0] == 0).all()

def test_prompts_and_gaps_are_parsed(folder):
    model = network(4, seq_len=12, packing=False)
    model.tokenizer = data.Tokenizer({"kind": "chars", "chars": "abc"})
    known, shown = flm.parse_known(model, "ab", "")
    assert known.tolist() == [1, 2] + [-1] * 10 and shown == 12
    known, shown = flm.parse_known(model, "", "a_c")
    assert known.tolist() == [1, -1, 3] + [0] * 9 and shown == 3
    for prompt, infill, message in (("abc" * 4, "", "at most 10 fit"), ("ad", "", "'d' is not in"),
                                    ("", "abc", "no gap"), ("a" * 11, "", "at most 10 fit")):
        with pytest.raises(UserError, match=message):
            flm.parse_known(model, prompt, infill)
    Path("t.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    model = network(270, seq_len=12)
    model.tokenizer = data.prepare("t.txt", "bpe", 8, True, 270).tokenizer
    the, fox = model.tokenizer.encode(["the", " fox"])
    known, shown = flm.parse_known(model, "", "the [MASK:2] fox [MASK]")
    given = [*the, -1, -1, *fox, -1]
    assert known.tolist() == given + [-1] * (12 - len(given)) and shown == len(given)
    model.config.packing = False
    tokens = torch.tensor([[*the, model.tokenizer.end, *fox]])
    assert flm.to_lines(model, tokens) == ["the"]
    assert flm.to_lines(model, tokens, infilled=True) == ["the fox"]

# ------------------------------------------------------------------------------ runs and files

def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def test_a_resumed_run_is_bit_identical(folder, monkeypatch, capsys):
    """With dropout, prompts and micro-batches; a copy is interrupted in step 2 of 6."""
    flow = (f"{TINY} --max-steps 6 --eval-every 4 --condition-prob .5 --dropout .1 "
            "--batch-size 20 --micro-batch-size 10")  # 20 rows have losses in all slices of tau
    for program, kind, flags, number in ((flm, "flm", flow, signal.SIGINT),
                                         (distill, "fmlm", "--max-steps 6", signal.SIGTERM)):
        def interrupted(model, tokens, rows, draw_known=flm.draw_known, number=number):
            if rows.step == 2 and rows.index.start == 0:
                os.kill(os.getpid(), number)
            return draw_known(model, tokens, rows)
        run(program, f"{flags} --run-dir whole --device cpu")
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(flm, "draw_known", interrupted)
            run(program, f"{flags} --run-dir parts --device cpu")
        assert stop.value.code == 128 + number
        message = f"stopped; parts/{kind}.pt contains step 3; continue with --resume\n"
        assert message in capsys.readouterr().err
        run(program, "--run-dir parts --resume --device cpu")
        whole = flm.load_checkpoint(Path(f"whole/{kind}.pt"))
        parts = flm.load_checkpoint(Path(f"parts/{kind}.pt"))
        del whole["log"], parts["log"]  # they contain times
        assert_equal(whole, parts)
        clock = flm.load(f"whole/{kind}.pt").clock
        assert (clock.nodes - clock.paper).abs().max() > 0.01  # it was adapted in steps 1 to 3

@pytest.mark.parametrize("program, kind", [("flm.py", "flm"), ("distill.py", "fmlm")])
def test_one_and_two_processes_train_identically(folder, program, kind):
    """After one AdamW step, the first moment is a tenth of the gradient. Gradients and held-out
    losses agree to 1e-5, also with micro-batches."""
    flags = f"{TINY} --max-steps 1 --optimizer adamw --condition-prob .5"
    if kind == "fmlm":
        run(flm, f"{flags} --max-steps 20 --lr .02 --run-dir one")  # a gradient far from zero
        flags = "--max-steps 1 --device cpu"
        for name in ("two", "micro"):
            shutil.copytree("one", name)
    found = []
    for name, processes, micro in (
            ("one", 1, ""), ("two", 2, ""), ("micro", 2, "--micro-batch-size 1")):
        done = command(program, f"{flags} {micro} --run-dir {name}", processes)
        assert done.returncode == 0, done.stderr
        saved = flm.load_checkpoint(Path(name, f"{kind}.pt"))
        moments = [state["exp_avg"].flatten() for state in saved["optimizers"][0]["state"].values()]
        found.append((torch.cat(moments), torch.tensor(saved["log"][-1]["by_tau"])))
    for gradient, heldout in found[1:]:
        assert (gradient - found[0][0]).norm() < 1e-5 * found[0][0].norm() != 0
        assert torch.allclose(heldout, found[0][1], rtol=1e-4)

def test_a_batch_that_two_processes_cannot_share_is_refused(folder):
    done = command("flm.py", f"{TINY} --batch-size 7 --run-dir r", processes=2)
    message = "flm.py: --batch-size 7: must be a multiple of the 2 processes"
    assert done.stderr.splitlines().count(message) == 1 and not Path("r").exists()

def test_a_corpus_of_one_line_needs_one_step(folder, capsys):
    Path("a.txt").write_text("the flow\n")
    run(flm, f"{TINY} --max-steps 120 --lr .02 --eval-every 999 --run-dir r")
    capsys.readouterr()
    run(flm, "--sample --run-dir r --sample-steps 1 --num-samples 5 --seed 9")
    assert capsys.readouterr().out.splitlines() == ["the flow"] * 5

def test_the_same_seed_gives_the_same_text_in_three_processes(folder, capsys):
    """Three processes compete for the processor; a bfloat16 run is sampled in float32. Text i does
    not depend on the number of texts."""
    run(flm, f"{TINY} --max-steps 30 --lr .02 --eval-every 999 --run-dir r --bf16")
    assert not flm.load("r/flm.pt").bf16
    line = [sys.executable, str(HERE / "flm.py"), "--sample", "--run-dir", "r", "--seed", "2",
            "--num-samples", "40", "--sample-steps", "8"]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    texts = [process.communicate()[0] for process in processes]
    assert texts[0] == texts[1] == texts[2] and len(texts[0].splitlines()) == 40
    model = flm.load("r/flm.pt")
    tokens = flm.sample(model, 40, 8, 2)
    assert torch.equal(tokens[:3], flm.sample(model, 3, 8, 2))
    assert not torch.equal(tokens, flm.sample(model, 40, 8, 3))
    drawn = flm.sample(model, 40, 8, 2, "ancestral", 0.5)
    assert torch.equal(drawn[:3], flm.sample(model, 3, 8, 2, "ancestral", 0.5))

def test_the_contract_of_a_run_folder(folder, capsys):
    """Names that other programs rely on, for a flow and a map; load needs the run folder only."""
    run(flm, f"{TINY} --max-steps 4 --eval-every 2 --condition-prob .5 --run-dir runs/r")
    run(distill, "--run-dir runs/r --max-steps 4 --device cpu")
    for kind in ("flm", "fmlm"):
        for end in (".pt", ".prev.pt", ".log.jsonl", ".loss.png", ".samples.txt"):
            assert Path(f"runs/r/{kind}{end}").stat().st_size > 0, end
    assert json.loads(Path("runs/r/config.json").read_text())["width"] == 16
    assert Path("runs/r/fmlm.config.json").exists() and Path("runs/r/tokenizer.json").exists()
    shutil.move("runs/r", "moved")
    Path("a.txt").unlink()
    flow, fmlm = flm.load("moved/flm.pt"), flm.load(Path("moved", "fmlm.pt"))
    V, tau = flow.V, torch.tensor([0.5])
    assert flow.embedding.shape == (V, 16) and flow.tokenizer.vocab_size == V
    assert torch.equal(flow.embedding, fmlm.embedding) and (flow.kind, fmlm.kind) == ("flm", "fmlm")
    state = flow.noise(flm.Rows(0, 0, range(1), 1))
    assert flow(state, tau).shape == fmlm(state, tau, tau).shape == (1, 12, V)
    assert flow(state, tau).dtype == torch.float32
    assert flm.sample(flow, 3, 2, 0).shape == distill.sample(fmlm, 3, 2, 0).shape == (3, 12)
    capsys.readouterr()
    for program in (flm, distill):
        run(program, "--sample --run-dir moved --num-samples 4 --sample-steps 2 --prompt ab")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(line.startswith("ab") for line in lines)
        run(program, "--sample --run-dir moved --num-samples 4 --infill a__a")
        lines = capsys.readouterr().out.splitlines()  # end tokens shorten a gap
        assert len(lines) == 4 and all(re.fullmatch("a.{0,2}a", line) for line in lines)

def test_a_map_can_be_trained_from_text_alone(folder):
    run(flm, f"{TINY} --max-steps 1 --run-dir r")
    run(distill, "--run-dir r --teacher none --max-steps 3 --device cpu")
    fmlm = flm.load("r/fmlm.pt")
    assert fmlm.step == 3 and not torch.equal(fmlm.embedding, flm.load("r/flm.pt").embedding)

def test_overwriting_removes_the_flow_its_map_and_nothing_else(folder):
    run(flm, f"{TINY} --max-steps 1 --run-dir r")
    for name in ("fmlm.pt", "fmlm.config.json", "mdlm.pt", "flm.py"):
        Path("r", name).write_text("mine")
    run(flm, f"{TINY} --max-steps 1 --run-dir r --overwrite --seed 4")
    assert not Path("r/fmlm.pt").exists() and not Path("r/fmlm.config.json").exists()
    assert Path("r/mdlm.pt").read_text() == Path("r/flm.py").read_text() == "mine"
    assert flm.load_checkpoint(Path("r/flm.pt"))["config"]["seed"] == 4

def test_invalid_inputs_are_one_line_and_change_nothing(folder):
    run(flm, f"{TINY} --max-steps 2 --condition-prob 0 --run-dir r")
    before = {path: path.read_bytes() for path in Path("r").iterdir()}
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    for program, line, message in [
        (flm, "--dataset nowhere.txt", "nowhere.txt: no such file"),
        (flm, f"{TINY} --dataset empty.txt --run-dir q", "the text is empty"),
        (flm, f"{TINY} --dataset latin.txt --run-dir q", "convert it to UTF-8"),
        (flm, f"{TINY} --seq-len 2 --run-dir q", "use a larger one or --packing"),
        (flm, f"{TINY} --run-dir r", "use --resume or --overwrite"),
        (flm, "--run-dir r --resume --width 32", "--width: the run has 16"),
        (flm, "--run-dir s --resume", "s/config.json: no such file"),
        (flm, "--prompt ab", "need --sample"),
        (flm, "--lr nan", "--lr nan: must be from 0 to 1"),
        (flm, "--batch-size 0", "must be from 1 to"),
        (flm, "--wdth 3", "unrecognized arguments"),
        (flm, "--width 16 --heads 3", "multiple of 2 \\* --heads"),
        (flm, "--sample --run-dir r --temperature .5", "needs --sampler ancestral"),
        (flm, "--sample --run-dir r --prompt ab", "trained without prompts"),
        (flm, "--sample --run-dir nowhere", "no such checkpoint"),
        (distill, "--run-dir nowhere", "no such checkpoint"),
        (distill, "--run-dir r --renoise 2", "--renoise"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            run(program, line)
        assert "\n" not in str(error.value), line
    assert before == {path: path.read_bytes() for path in Path("r").iterdir()}
    done = command("flm.py", "--dataset nowhere.txt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout

def test_nothing_heavy_is_imported():
    code = "import sys, torch; a = set(sys.modules); import flm; print(*set(sys.modules) - a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    heavy = {"tqdm", "matplotlib", "tiktoken", "tokenizers", "filelock"}
    assert done.returncode == 0 and not heavy & set(done.stdout.split())
