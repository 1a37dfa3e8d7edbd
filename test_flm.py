"""Each test compares a number with an analytic or independent value; tolerances are derived.

    pytest test_flm.py
"""

import math
import os
import re
import shlex
import shutil
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
UNKNOWN = torch.tensor(-1)  # no token is known
SMALL = dict(depth=2, width=16, heads=2, cond_width=8, seq_len=5, dropout=0.0)
TINY = ("--depth 2 --width 16 --heads 2 --batch-size 8 --warmup 0 --device cpu --dataset a.txt "
        "--tokenizer chars --no-packing --seq-len 12")
TEXT = "".join(f"{word} {i}\n" for i in range(100) for word in ("ab", "ba", "abba"))
P = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
TOKENS = torch.arange(5)[:, None], P  # texts of one token, and their probabilities
PHRASES = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0.5, 0.5])  # "new york", "san diego"
as_it_is = torch.nn.Identity()  # `clean` of states x_t in R^V

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

def last(sampler_steps):
    """The probs of the last step that a sampler yields."""
    *_, (_, _, probs) = sampler_steps
    return probs

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
    over its tokens. With E, states are x E and x is found by the pseudo-inverse. A clean state has
    probability 0 in the flow, so its token is known. With two times, it is the flow map, by 64
    Euler steps; this is for states x only.
    """

    def __init__(self, texts, p, E=None):
        super().__init__()
        self.log_p, self.one_hot = p.log(), F.one_hot(texts).to(p.dtype)
        _, L, self.V = self.one_hot.shape
        self.embedding = torch.eye(self.V, dtype=p.dtype) if E is None else E
        self.inverse = torch.linalg.pinv(self.embedding)
        self.clock = flm.Clock(self.V)
        self.config = flm.Config(seq_len=L, width=self.embedding.shape[1])

    factor = flm.Transformer.factor  # for extras.evaluate

    def noise(self, B, generator=None):
        x0 = torch.randn(B, self.config.seq_len, self.V, generator=generator)
        return x0 @ self.embedding

    def clean(self, x):
        return (x if x.is_floating_point() else F.one_hot(x, self.V).float()) @ self.embedding

    def denoiser(self, state, tau):
        """E[x1 | x_t], (B, L, V)."""
        t, norms = self.clock.t(tau)[:, None, None], (self.embedding @ self.inverse).diag()
        evidence = (t * state @ self.inverse - t**2 / 2 * norms) / (1 - t).clamp(min=1e-3) ** 2
        known = (state[..., None, :] == self.embedding).all(-1)  # (B, L, V)
        evidence = torch.where(known.any(-1, keepdim=True), 1000 * known, evidence)
        score = self.log_p + torch.einsum("blv,nlv->bn", evidence, self.one_hot)
        return torch.einsum("bn,nlv->blv", score.softmax(-1), self.one_hot)

    def forward(self, state, tau_s, tau_t=None):
        if tau_t is None:
            return self.denoiser(state, tau_s).clamp(min=1e-30).log()
        x, taus = state, torch.lerp(tau_s, tau_t, torch.linspace(0, 1, 65)[:, None])
        for tau, tau_next in zip(taus, taus[1:]):
            t, t_next = distill.times(self, tau, tau_next)
            x = x + (t_next - t) / (1 - t) * (self.denoiser(x, tau) - x)
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

def test_euler_converges_to_the_source_as_theory_predicts():
    """Total variation with the exact denoiser; the figures are from 2,000,000 paths. With 200,000,
    the standard error is .001: 4 of them. One step always returns the most frequent token."""
    source, noise = Source(*TOKENS), torch.randn(200_000, 1, 5)
    for steps, expected in [(1, 0.60), (2, 0.0945), (4, 0.032), (8, 0.013), (16, 0.0055)]:
        tokens = last(flm.euler(source.denoiser, noise, source.clock, steps, as_it_is)).argmax(-1)
        assert abs(total_variation(tokens, P) - expected) < (0.004 if steps > 1 else 1e-6), steps

def test_euler_is_of_first_order():
    """N uniform steps in t up to .8: doubling N halves the distance to a fine solution (2 +- .1;
    the error of the fine one, 1/32 of the smallest measured, changes the last ratio to 2.03)."""
    class Uniform(torch.nn.Module):
        t = staticmethod(lambda tau: 0.8 * tau)
    source, end = Source(TOKENS[0], P.double()), {}
    source.clock, noise = Uniform(), torch.randn(500, 1, 5, dtype=torch.float64)
    for steps in (20, 40, 80, 160, 5120):
        steps_taken = flm.euler(source.denoiser, noise, source.clock, steps, as_it_is)
        *_, (tau, state, probs) = steps_taken
        t = source.clock.t(tau)
        end[steps] = state + (0.8 - t) / (1 - t) * (probs - state)
    errors = [(end[n] - end[5120]).abs().mean() for n in (20, 40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(coarse / fine - 2) < 0.1

def test_the_exact_flow_never_mixes_two_phrases():
    """0 of 2000 are mixed, and each phrase has 45 to 55 % (4.5 standard errors of .011). Drawing
    each token from its marginal mixes half of them (.5 +- .05)."""
    source, noise = Source(*PHRASES), torch.randn(2000, 2, 4)
    probs = last(flm.euler(source.denoiser, noise, source.clock, 256, as_it_is))
    first, second = probs.argmax(-1).T
    assert torch.equal(second, first + 1) and 0.45 < (first == 0).float().mean() < 0.55
    marginals = source.denoiser(noise, torch.zeros(2000)).flatten(0, 1)
    first, second = marginals.multinomial(1).view(2000, 2).T
    assert abs((second != first + 1).float().mean() - 0.5) < 0.05

def test_samplers_in_v_and_in_d_dimensions_agree(monkeypatch):
    """The network sees x_t only through x_t W, and each step is linear: float64 rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # flm's logits are float32
    model = network(23, dtype=torch.float64)
    eps = torch.randn(3, 5, 23, dtype=torch.float64)
    def in_d(state, tau):
        return model(state, tau).softmax(-1)
    def in_v(x, tau):
        return model(x @ model.embedding, tau).softmax(-1)
    small = last(flm.euler(in_d, eps @ model.embedding, model.clock, 16, model.clean))
    large = last(flm.euler(in_v, eps, model.clock, 16, as_it_is))
    assert (small - large).abs().max() < 1e-12 and small.std() > 0.01

def test_the_length_of_a_padded_text_is_chosen_first():
    """1000 random rows, against the product of probabilities of every length (float64). With
    packing, the text is the argmax. Known tokens fix or bound the length."""
    model, end, n, L = network(4, packing=False), 2, 1000, 5
    model.tokenizer = SimpleNamespace(end=end)
    probs = (3 * torch.randn(n, L, 4)).softmax(-1)
    texts, p = flm.most_probable(model, probs, UNKNOWN), probs[..., end].double()
    for length in range(L):
        inside = torch.arange(L) < length
        P = [torch.where(torch.arange(L) < k, 1 - p, p).prod(1) for k in range(L)]
        rows = torch.stack(P).argmax(0) == length
        words = probs[rows].index_fill(-1, torch.tensor(end), -1).argmax(-1)
        assert rows.any() and torch.equal(texts[rows], torch.where(inside, words, end))
    known = torch.tensor([-1, 0, -1, end, end]).expand(n, L)
    texts = flm.most_probable(model, probs, known)
    assert (texts[:, 1] == 0).all()
    assert torch.equal((texts != end).sum(1), 2 + (p[:, 2] < 0.5))
    known = F.pad(torch.tensor([[0, end]]), (126, 0), value=-1)  # the 0 outweighs 126 sure ends
    assert (flm.most_probable(model, torch.eye(4)[None, [end] * 128], known) == end).sum() == 1
    model.config.packing = True
    assert torch.equal(flm.most_probable(model, probs, UNKNOWN), probs.argmax(-1))

# ------------------------------------------------------------------------------ noise and loss
@pytest.mark.parametrize("V, D", [(40, 6), (6, 6)])
def test_noise_has_the_covariance_of_one_hot_noise(V, D):
    """cov = E^T E. An entry of a Gaussian sample covariance has the standard error
    sqrt((C_ij^2 + C_ii C_jj) / n): 5 of them. V <= D uses another formula with the same law."""
    model = network(V, width=D, heads=1)
    h = model.noise(5000).detach().flatten(0, 1)
    C = (model.embedding.T @ model.embedding).detach()
    error = ((C**2 + C.diag()[:, None] * C.diag()) / len(h)).sqrt()
    assert ((h.T @ h / len(h) - C).abs() / error).max() < 5
    assert (h.mean(0).abs() / (C.diag() / len(h)).sqrt()).max() < 5

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
    assert model.noise(2).isnan().all()

def test_an_untrained_network_has_the_loss_log_v():
    model = flm.Transformer(flm.Config(**SMALL), 33)
    nats, _ = flm.flow_loss(model, torch.randint(33, (16, 5)))
    assert torch.allclose(nats, torch.full((16,), math.log(33)), atol=1e-5)

def test_times_are_uniform_and_one_in_each_interval():
    """Of 64,000 times. The standard error of a U(0, 1/16) mean is 1/(16 sqrt(12 n)): 4 of them."""
    tau = torch.stack([flm.uniform_times(16, CPU) for _ in range(4000)])
    assert ((16 * tau).long() == torch.arange(16)).all()
    assert abs(tau.mean() - 0.5) < 4 / (16 * math.sqrt(12 * tau.numel()))

def test_the_loss_of_the_exact_denoiser_is_the_conditional_entropy():
    """flow_loss with the oracle in place of the network, V = 5 <= D: its mean over 40,000 rows, of
    which 1/64 have tau = 0, is E[-log D_t(x_t)[x1]] of independent draws; 4 standard errors."""
    n, model = 40_000, Source(*TOKENS)
    tokens = P.multinomial(n, replacement=True)[:, None]
    ours, tau = flm.flow_loss(model, tokens)
    assert abs((tau == 0).float().mean() - 1 / 64) < 1e-4
    t = model.clock.t(torch.rand(n) * (torch.rand(n) > 1 / 64))[:, None]
    x = (1 - t) * torch.randn(n, 5) + t * F.one_hot(tokens[:, 0], 5)
    log_posterior = P.log() - ((x[:, None] - t[..., None] * torch.eye(5)) ** 2).sum(-1) / (
        2 * (1 - t) ** 2)
    theirs = -log_posterior.log_softmax(-1).gather(1, tokens)
    assert abs(ours.mean() - theirs.mean()) < 4 * ((ours.var() + theirs.var()) / n).sqrt()

# ------------------------------------------------------------------------------------- network
def test_logits_scores_and_states_are_capped_or_normalised():
    """30 tanh(z/30), where z is the uncapped output; attention against the fused kernel. Normalised
    states have no scale."""
    model = network(11)
    model.head.weight.data *= 100
    state, tau = model.noise(3), torch.tensor([0.3, 0.6, 0.99])
    capped = model(state, tau)
    model.config.logit_cap = 0.0
    z = model(state, tau)
    assert torch.allclose(capped, 30 * torch.tanh(z / 30), atol=1e-4) and z.abs().max() > 60
    model.config.state_norm = True
    assert torch.allclose(model(9 * state, tau), model(99 * state, tau), atol=0.01)
    block, (q, k, v) = model.blocks[0], torch.randn(3, 2, 3, 12, 4)
    assert torch.allclose(block.attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    block.cap = 1.0
    scores = torch.tanh(q @ k.mT / 2)
    assert torch.allclose(block.attend(q, k, v), scores.softmax(-1) @ v, atol=1e-5)

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
        """D_s or delta_{s,t}, (B, 1, 2), in float64."""
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

    def forward(self, state, tau_s, tau_t=None):
        logits = self.exact(state, tau_s, tau_t).log().float()
        return logits + self.theta if torch.is_grad_enabled() else logits

def gradients(loss, model):
    """The largest gradient of the output in each row, and the mean absolute loss."""
    torch.manual_seed(0)
    rows = len(model.theta)
    tokens = (torch.rand(rows, 1) < model.p).long()
    value, _ = loss(model, tokens)
    value.sum().backward()
    return model.theta.grad.abs().amax((1, 2)), value.abs().mean()

def test_the_true_map_is_the_fixed_point_of_the_semigroup_loss():
    """Float32 states (6e-8) are multiplied by at most t/(1-t)^2 < 60, twice: gradients below 1e-5.
    One of 512 rows may be so near the edge between the tokens that its target flips. The loss,
    a divergence, is 0. One Euler step instead of the map is not a fixed point.

    The target of journeys to the data is D at tau = 63/64. Its argmax is wrong with probability
    1/128 (V = 2): the true map errs by at most twice that in 256 rows. Another end errs by 1.
    """
    def loss_of(ends):
        draw = partial(distill.draw_journeys, ends=ends)
        return partial(distill.map_loss, ExactFlow(), draw=draw)
    loss = loss_of(ends=0)
    gradient, value = gradients(loss, ExactFlow(rows=512))
    assert (gradient > 1e-5).sum() <= 1 and value < 1e-5
    assert (gradients(loss, ExactFlow(rows=512, coarse=True))[0] > 0.01).sum() > 100
    loss = loss_of(ends=1)
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
        target = distill.semigroup(delta, model, torch.zeros(300, 1, 2), tau_s, tau_t)
        w = target[:, 0, 0]
        s, u, t = (model.clock.t(x).double() for x in (tau_s, (tau_s + tau_t) / 2, tau_t))
        exact = torch.where(t - s < 1e-6, 0.5, (1 - t) * (u - s) / ((1 - u) * (t - s)))
        assert w.min() >= 0 and w.max() <= 1 and (w - exact).abs().max() < 1e-6
        assert torch.allclose(target.sum(-1), torch.ones(300, 1), atol=1e-6)
        assert (w == {0.0: 0.5, 1.0: 0.0}.get(share, w)).all()

def test_a_map_starts_as_its_flow_and_is_the_identity_from_t_to_t():
    """And its end at t = 1 has its probabilities."""
    flow, tau = network(11), torch.tensor([0.0, 0.4, 0.999])
    model, state = flm.FlowMap(flow.config, 11), flow.noise(3)
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
    delta, noise = partial(flm.denoise, model, UNKNOWN.expand(n, 1), 1.0), partial(model.noise, n)
    steps = distill.few_steps(delta, noise(), model.clock, 4, model.clean, noise, renoise)
    with torch.no_grad():
        for tau, state, probs in steps:
            y = model.difference(state).flatten().sort()[0]
            uniform = (torch.arange(n) + 0.5) / n
            distance = (model.law(y, model.clock.t(tau).double()) - uniform).abs().max()
            assert distance * math.sqrt(n) < 1.95
    assert abs(probs[..., 1].mean() - model.p) < 4 * math.sqrt(model.p * (1 - model.p) / n)

def test_without_fresh_noise_the_map_sampler_is_euler():
    source, noise = Source(*PHRASES), torch.randn(50, 2, 4)
    def delta(state, tau_s, tau_t):
        return source.denoiser(state, tau_s)
    ours = last(distill.few_steps(delta, noise, source.clock, 4, source.clean))
    theirs = last(flm.euler(source.denoiser, noise, source.clock, 4, source.clean))
    assert torch.allclose(ours, theirs, atol=1e-6)

def test_one_step_of_a_trained_map_does_not_mix_two_phrases():
    """At most 1 % of 2000 noises give "new diego" or "san york"; each phrase has 45 to 55 % (4.5
    standard errors). The exact flow teaches a new network in 800 steps."""
    config = flm.Config(seq_len=2, width=32, heads=2, depth=2, cond_width=16, dropout=0.0, lr=0.01,
                        optimizer="muon", max_steps=800, warmup=20, decay=1.0, time_scale=100.0,
                        packing=False)
    model = flm.FlowMap(config, 4)
    model.embedding.requires_grad_(False)
    loss = partial(distill.map_loss, Source(*PHRASES, model.embedding.data))
    optimizers = flm.make_optimizers(model, config)
    for step in range(config.max_steps):
        tokens = PHRASES[0][torch.randint(2, (256,))]
        loss(model, tokens)[0].mean().backward()
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
def test_known_tokens_of_a_training_batch():
    """6000 rows of 10 tokens with condition_prob .6. A row has a random share a of known tokens, so
    its count is uniform on 0 ... 10: 1/11 of the chosen rows have none. 4 standard errors."""
    model = network(11, seq_len=10, condition_prob=0.6)
    tokens = torch.randint(11, (6000, 10))
    known = flm.draw_known(model, tokens)
    given = known >= 0
    assert torch.equal(known[given], tokens[given])
    share, counts = given.any(1).float().mean(), given.sum(1).bincount(minlength=11) / 6000
    assert abs(share - 0.6 * 10 / 11) < 4 * 0.0064
    assert (counts[1:] - 0.6 / 11).abs().max() < 4 * (0.6 / 11 / 6000) ** 0.5
    assert (flm.draw_known(model.eval(), tokens) == -1).all()
    state = model.noise(6000)
    mixed = flm.insert_known(model, state, known)
    assert torch.equal(mixed[given], model.embedding[known[given]])
    assert torch.equal(mixed[~given], state[~given])

PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3)), torch.tensor(
    [0.25, 0.05, 0.10, 0.02, 0.20, 0.03, 0.15, 0.10, 0.10])

@pytest.mark.parametrize("sampler, steps", [
    (flm.sample, 64), (distill.sample, 1), (distill.sample, 2)])
@pytest.mark.parametrize("known", [[1, -1], [-1, 2], [-1, -1]])
def test_texts_have_the_conditional_law_given_the_known_tokens(sampler, steps, known):
    """4 binomial standard errors, and .005 for the 64 steps."""
    n, known = 20_000, torch.tensor(known)
    texts = sampler(Source(*PAIRS), n, steps, 0, known=known)
    found = (3 * texts[:, 0] + texts[:, 1]).bincount(minlength=9) / n
    expected = PAIRS[1] * ((known < 0) | (PAIRS[0] == known)).all(1)
    expected /= expected.sum()
    assert (found - expected).abs().max() < 4 * 0.5 / n**0.5 + 0.005
    assert (found[expected == 0] == 0).all()

def test_prompts_and_gaps_are_parsed(folder):
    model = network(4, seq_len=12, packing=False)
    model.tokenizer = data.Tokenizer({"kind": "chars", "chars": "abc"})
    assert flm.parse_prompt(model, "ab").tolist() == [1, 2] + [-1] * 10
    assert flm.parse_prompt(model, "a_c").tolist() == [1, -1, 3] + [0] * 9
    for prompt, message in (("abc" * 4, "has 12 tokens; 11 fit"), ("ad", "'d' is not in")):
        with pytest.raises(UserError, match=message):
            flm.parse_prompt(model, prompt)
    model = network(9, seq_len=12)
    model.tokenizer = SimpleNamespace(kind="bpe", begin=None, encode=lambda texts: [
        [len(text)] if text else [] for text in texts])  # a token per text: its length
    known = flm.parse_prompt(model, "the [MASK] [MASK] fox [MASK]").tolist()
    assert known == [3, -1, -1, 4, -1] + [-1] * 7

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

def stop_at(monkeypatch, program, loss, step):
    """Makes training raise KeyboardInterrupt at a step, in a forward pass."""
    calls, original = [], getattr(program, loss)
    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return original(*arguments, **options)
    monkeypatch.setattr(program, loss, stopping)

def test_a_resumed_run_is_bit_identical(folder):
    """With dropout, known tokens and micro-batches (10, 10, 5). A copy is interrupted in its ninth
    forward pass and goes on from step 2."""
    flow = (f"{TINY} --max-steps 6 --eval-every 2 --condition-prob .5 --dropout .1 "
            "--batch-size 25 --micro-batch-size 10")
    for program, kind, flags, loss in ((flm, "flm", flow, "flow_loss"),
                                       (distill, "fmlm", "--max-steps 6", "map_loss")):
        run(program, f"{flags} --run-dir whole --device cpu")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            # each evaluation of the held-out rows is one forward pass, too
            stop_at(patch, program, loss, 8)
            run(program, f"{flags} --run-dir parts --device cpu")
        assert flm.load_checkpoint(Path(f"parts/{kind}.pt"))["step"] == 2
        run(program, "--run-dir parts --resume --device cpu")
        whole = flm.load_checkpoint(Path(f"whole/{kind}.pt"))
        parts = flm.load_checkpoint(Path(f"parts/{kind}.pt"))
        for content in (whole, parts):
            for entry in content["log"]:
                del entry["seconds"]
            content["log"] = str(content["log"])  # a loss without rows is NaN
        assert_equal(whole, parts)

FIXED_NOISE = """
import sys, torch
sys.path.insert(0, sys.argv.pop(1))
import flm
def fixed(model, tokens, flow_loss=flm.flow_loss):
    key = (tokens * torch.arange(1, 13)).sum(1)
    rows = [torch.randn(12, 16, generator=torch.Generator().manual_seed(k)) for k in key.tolist()]
    model.noise = lambda B, generator=None: torch.stack(rows[:B]) @ model.factor().T
    flm.uniform_times = lambda B, device: key % 101 / 101
    return flow_loss(model, tokens)
flm.flow_loss = fixed
flm.run(flm.main)
"""

def test_two_processes_compute_the_gradient_of_one(folder):
    """Given the same noise and times, which are here functions of the tokens of a row. After one
    AdamW step, the first moment is a tenth of the gradient: float32 rounding, 1e-5."""
    Path("fixed.py").write_text(FIXED_NOISE)
    Path("a.txt").write_text("".join(f"{chr(97 + i % 20)}{i}\n" for i in range(300)))  # V > D
    flags = f"{HERE} {TINY} --max-steps 1 --optimizer adamw --condition-prob 0"
    found = []
    for name, processes, micro in (("one", 1, ""), ("two", 2, ""), ("three", 2, "3")):
        micro = micro and f"--micro-batch-size {micro}"
        done = command(Path("fixed.py").resolve(), f"{flags} {micro} --run-dir {name}", processes)
        assert done.returncode == 0, done.stderr
        content = flm.load_checkpoint(Path(name, "flm.pt"))
        moments = [state["exp_avg"] for state in content["optimizers"][0]["state"].values()]
        found.append((torch.cat([x.flatten() for x in moments]), content["log"][-1]["loss"]))
    for gradient, loss in found[1:]:
        assert (gradient - found[0][0]).norm() < 1e-5 * found[0][0].norm() != 0
        assert abs(loss - found[0][1]) < 1e-5

def test_a_batch_that_two_processes_cannot_share_is_refused(folder):
    done = command("flm.py", f"{TINY} --batch-size 7 --run-dir r", processes=2)
    assert "flm.py: --batch-size 7: not a multiple of 2 processes" in done.stderr.splitlines()
    assert done.returncode and not Path("r").exists()

def test_a_corpus_of_one_line_needs_one_step(folder, capsys):
    Path("a.txt").write_text("the flow\n")
    run(flm, f"{TINY} --max-steps 120 --lr .02 --eval-every 999 --run-dir r")
    capsys.readouterr()
    run(flm, "--sample --run-dir r --sample-steps 1 --num-samples 5 --seed 9")
    assert capsys.readouterr().out.splitlines() == ["the flow"] * 5

def test_the_same_seed_gives_the_same_text_in_three_processes(folder):
    """Three processes compete for the processor; a bfloat16 run is sampled in float32."""
    run(flm, f"{TINY} --max-steps 30 --lr .02 --eval-every 999 --run-dir r --bf16")
    assert not flm.load("r/flm.pt").bf16
    flags = "--sample --run-dir r --seed 2 --num-samples 40 --sample-steps 8 --device cpu"
    line = [sys.executable, str(HERE / "flm.py"), *flags.split()]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    texts = [process.communicate()[0] for process in processes]
    assert texts[0] == texts[1] == texts[2] and len(texts[0].splitlines()) == 40
    model = flm.load("r/flm.pt")
    assert not torch.equal(flm.sample(model, 40, 8, 2), flm.sample(model, 40, 8, 3))

def test_the_contract_of_a_run(folder, capsys):
    """One file is enough, for a flow and a map, which start from the same noise."""
    run(flm, f"{TINY} --max-steps 4 --eval-every 2 --condition-prob .5 --run-dir runs/r")
    run(distill, "--run-dir runs/r --max-steps 4 --device cpu")
    assert sorted(os.listdir("runs/r")) == ["flm.pt", "fmlm.pt"]
    shutil.move("runs/r", "moved")
    Path("a.txt").unlink()
    flow, fmlm = flm.load("moved/flm.pt"), flm.load(Path("moved", "fmlm.pt"))
    V, tau = flow.V, torch.tensor([0.5])
    assert flow.embedding.shape == (V, 16) and flow.tokenizer.vocab_size == V
    assert torch.equal(flow.embedding, fmlm.embedding)
    state = flow.noise(1)
    assert flow(state, tau).shape == fmlm(state, tau, tau).shape == (1, 12, V)
    assert flow(state, tau).dtype == torch.float32
    assert flm.sample(flow, 3, 2, 0).shape == distill.sample(fmlm, 3, 2, 0).shape == (3, 12)
    cold, warm = flm.sample(flow, 50, 8, 0, 0.01), flm.sample(flow, 50, 8, 0, 5.0)
    assert len(cold.unique(dim=0)) < len(warm.unique(dim=0))
    capsys.readouterr()
    for program in (flm, distill):
        flags = "--sample --run-dir moved --device cpu --num-samples 4 --sample-steps 2"
        run(program, f"{flags} --prompt ab --temperature .8")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(line.startswith("ab") for line in lines)
        run(program, f"{flags} --prompt a__a")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4 and all(re.fullmatch("a(..a)?.?", line) for line in lines)

def test_the_map_in_pretrained_agrees_with_its_flow():
    """Its 4 steps repeat .64 of the flow's tokens (512 texts); standard error of 128: .022."""
    flow, fmlm = [flm.load(HERE / "pretrained/sentences" / f"{kind}.pt") for kind in flm.NETWORKS]
    slow, fast = flm.sample(flow, 128, 64, 0), distill.sample(fmlm, 128, 4, 0)
    assert (slow == fast)[slow != flow.tokenizer.end].float().mean() > 0.64 - 4 * 0.022

def test_a_map_from_text_alone_and_overwriting(folder):
    """Overwriting removes the flow, its maps and nothing else."""
    run(flm, f"{TINY} --max-steps 1 --run-dir r")
    run(distill, "--run-dir r --teacher none --max-steps 3 --device cpu")
    content = flm.load_checkpoint(Path("r/fmlm.pt"))
    assert content["step"] == 3 and content["config"]["teacher"] == "none"
    assert not torch.equal(content["average"]["embedding"], flm.load("r/flm.pt").embedding)
    for name in ("fmlm.pt", "mdlm.pt", "flm.py"):
        Path("r", name).write_text("mine")
    run(flm, f"{TINY} --max-steps 1 --run-dir r --overwrite --seed 4")
    assert not Path("r/fmlm.pt").exists()
    assert Path("r/mdlm.pt").read_text() == Path("r/flm.py").read_text() == "mine"
    assert flm.load_checkpoint(Path("r/flm.pt"))["config"]["seed"] == 4

def test_invalid_inputs_are_one_line_and_change_nothing(folder):
    run(flm, f"{TINY} --max-steps 2 --condition-prob 0 --run-dir r")
    run(distill, "--run-dir r --max-steps 1 --device cpu")
    before = {path: path.read_bytes() for path in Path("r").iterdir()}
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("b.txt").write_text(TEXT + "more\n")
    Path("damaged").mkdir()
    Path("damaged/flm.pt").write_bytes(before[Path("r/flm.pt")][:5000])
    for program, line, message in [
        (flm, "--dataset nowhere.txt", "nowhere.txt: not found"),
        (flm, f"{TINY} --dataset empty.txt --run-dir q", "the text is empty"),
        (flm, f"{TINY} --dataset latin.txt --run-dir q", "convert it to UTF-8"),
        (flm, f"{TINY} --run-dir r", "exists; use --resume, --overwrite"),
        (flm, "--run-dir r --resume --width 32", "other network or optimizer; omit its flags"),
        (flm, "--run-dir damaged --resume", "damaged/flm.pt: no checkpoint; check the path"),
        (flm, "--lr nan", "--lr: must be from 0 to 1"),
        (flm, "--sample --run-dir r --temperature 0", "must be greater than 0"),
        (flm, "--sample --run-dir r --prompt ab", "trained with --condition-prob"),
        (flm, "--sample --run-dir nowhere", "no checkpoint; check the path"),
        (distill, "--run-dir nowhere", "no checkpoint; check the path"),
        (distill, "--run-dir r --renoise 2", "--renoise: must be from 0 to 1"),
        (distill, "--run-dir r --dataset b.txt --overwrite", "not the text of the flow"),
        (distill, "--run-dir r --resume --teacher none", "and --teacher that trained it"),
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
    heavy = {"matplotlib", "tiktoken", "tokenizers", "filelock", "pyarrow", "datasets"}
    assert done.returncode == 0 and not heavy & set(done.stdout.split())
