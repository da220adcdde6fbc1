"""MLP policy and critic as one dict of tensors, and the policy-gradient and actor-critic losses on it.

Axes: S runs, M tasks, K trajectories, H time steps, D features; B = S·M where runs and tasks are flattened. Needs
torch and numpy. Trajectories, as `envs.rollout` returns them, are a dict with

    obs (S, M, K, H, D)    actions (S, M, K, H) or (S, M, K, H, A)    rewards (S, M, K, H)
    mask (S, M, K, H)      True while the episode runs; entries after its end are padding and are ignored
    last_obs (S, M, K, D)  the observation after the last step        terminated (S, M, K)  False: truncated there
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy
import torch

# --- networks ---


def init_mlp(name, sizes, uniform):
    """Parameters `name.i.weight` (S, 1, in, out) and `name.i.bias` (S, 1, 1, out), drawn by `uniform`, see `init`.

    Distributed like torch.nn.Linear's: uniform within ±1/√in.
    """
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        for kind, rows in (("weight", n_in), ("bias", 1)):
            params[f"{name}.{i}.{kind}"] = (2 * uniform(rows, n_out) - 1) / math.sqrt(n_in)
    return params


def init(obs_dim, head, uniform, hidden=(64, 64), critic=False):
    """θ: a dict of leaves (S, 1, ...) for S runs; `critic` adds V(s) as a second MLP.

    uniform: (rows, columns) -> numbers in [0, 1), a tensor (S, 1, rows, columns); for one run without further ado
    lambda *shape: torch.rand(1, 1, *shape).
    """
    theta = init_mlp("policy", [obs_dim, *hidden, head.size], uniform)
    if isinstance(head, Gaussian):
        theta["policy.raw_std"] = torch.zeros_like(theta[f"policy.{len(hidden)}.bias"])
    if critic:
        theta |= init_mlp("critic", [obs_dim, *hidden, 1], uniform)
    return {name: p.requires_grad_() for name, p in theta.items()}


def layers(params, name):
    """The weights and the biases of the MLP `name` of params (S, M, ...): lists of (B, ...)."""
    return (
        [p.reshape(-1, *p.shape[2:]) for key, p in params.items() if key.startswith(name) and key.endswith(kind)]
        for kind in (".weight", ".bias")
    )


def mlp(params, name):
    """The tanh MLP `name` of params (S, M, ...) as a function x (B, N, D) -> (B, N, out), for the losses."""
    weights, biases = layers(params, name)

    # Inside, x is (B, features, N): BLAS takes several times as long for a product of few columns as for one of few
    # rows, and the policy's outputs are few. All sizes are padded with zeros: a matrix product with a vector, and σ of
    # what fills no vector register, would have other bits in another batch.
    size = weights[-1].shape[-1]
    weights, biases = [padded(weight.mT, 4, 4) for weight in weights], [padded(bias.mT, 4, 1) for bias in biases]

    # tanh(z) = 2σ(2z) − 1, with its constants moved into the weights: σ takes a third of the time of tanh on a CPU.
    for i in range(len(weights) - 1):
        biases[i], biases[i + 1] = 2 * biases[i], biases[i + 1] - weights[i + 1].sum(2, keepdim=True)
        weights[i], weights[i + 1] = 2 * weights[i], 2 * weights[i + 1]

    def forward(x):
        n, x = x.shape[1], padded(x.mT, 4, 32)
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = torch.baddbmm(bias, weight, x).sigmoid()
        return torch.baddbmm(biases[-1], weights[-1], x)[:, :size, :n].mT

    return forward


def padded(x, rows, columns):
    """x (..., n, m) with zeros behind it, up to multiples of `rows` and `columns`, contiguous."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows)).contiguous()


def acting(params, name, xp=numpy):
    """`mlp` for rollouts, without its padding and without a graph, on arrays of xp: numpy on a CPU, where a call on so
    small arrays costs a quarter of torch's; torch on a GPU."""
    weights, biases = layers(params, name)
    repeated = []  # the biases for the last N, (B, N, out): numpy adds arrays of one shape in a third of the time

    def forward(x):
        if xp is numpy and (not repeated or repeated[0].shape[1] != x.shape[1]):
            repeated[:] = [bias.repeat(x.shape[1], 1) for bias in biases]
        for weight, bias in zip(weights, repeated or biases, strict=True):
            x = x @ weight
            x += bias
            if weight is not weights[-1]:
                x = numpy.tanh(x, out=x) if xp is numpy else x.tanh()
        return x

    return forward


# --- action distributions ---


class Categorical:
    """Discrete actions 0 .. size−1 by softmax over the policy's outputs; actions (B, N), noise (B, N, size)."""

    def __init__(self, size):
        self.size = size

    def sample(self, params, outputs, noise, xp=torch):
        """The Gumbel-max trick: argmax(logits + Gumbel noise) is distributed as softmax(logits)."""
        return (outputs + noise).argmax(-1)

    def log_prob(self, params, outputs, actions):
        # over an axis that is not the last in memory: with few actions that takes a tenth of the time
        return outputs.mT.log_softmax(1).gather(1, actions.unsqueeze(1)).squeeze(1)

    def distribution(self, params, outputs):
        """What `kl` compares: the log-probabilities (B, N, size)."""
        return (outputs.mT.log_softmax(1).mT,)

    def kl(self, old, new):
        """KL(old ‖ new) = Σₐ old(a) log(old(a) / new(a)) of two `distribution`s: (B, N)."""
        (old,), (new,) = old, new
        return (old.exp() * (old - new)).sum(-1)


class Gaussian:
    """Actions in a box, scaled to [−1, 1] per dimension: N(mean(s), σ²), σ learned and the same in every state.

    Actions and noise are (B, N, size). The environment clips what falls outside the box; the density is that of the
    action before clipping, so ∇ log π is exact.
    σ = m + (u + √(u² + 0.01)) / 2 with u = 1 − m + x of a learned x, where m is `min_std`: about 1 + x, and 1.005 at
    x = 0. It stays above m because the gradient grows as 1/σ, the Hessian as 1/σ², and constant SGD steps blow up when
    σ shrinks further. It comes near m within 0.1 of u = 0, so that policies do not stay noisy for long, and keeps a
    slope there, so it never freezes, as it would if it were clipped. A square root has the same bits in any batch.
    """

    def __init__(self, size, min_std=0.5):
        self.size = size
        self.min_std = min_std

    def std(self, params, xp=torch):  # (B, 1, size)
        x = params["policy.raw_std"]
        x = x.reshape(-1, *x.shape[2:])
        u = 1 - self.min_std + x
        return self.min_std + (u + xp.sqrt(u * u + 0.01)) / 2

    def sample(self, params, outputs, noise, xp=torch):
        return outputs + self.std(params, xp) * noise

    def log_prob(self, params, outputs, actions):
        return self.log_density(params, outputs, actions).sum(-1)

    def log_density(self, params, outputs, actions):
        """Of each dimension: (B, N, size)."""
        std = self.std(params)
        z = (actions - outputs) / std
        return -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)

    def censored_log_prob(self, params, outputs, actions):
        """`log_prob` of actions after clipping to [−1, 1]: one at an end counts as all that is clipped to it."""
        std = self.std(params)
        inside = self.log_density(params, outputs, actions)
        above = torch.special.log_ndtr((outputs - 1) / std)
        below = torch.special.log_ndtr((-1 - outputs) / std)
        logs = torch.where(actions >= 1, above, inside)
        return torch.where(actions <= -1, below, logs).sum(-1)

    def distribution(self, params, outputs):
        """What `kl` compares: the means (B, N, size) and standard deviations (B, 1, size)."""
        return outputs, self.std(params)

    def kl(self, old, new):
        """KL(old ‖ new) = Σ log(σ'/σ) + (σ² + (μ − μ')²) / 2σ'² − ½ of two `distribution`s: (B, N)."""
        (mean, std), (new_mean, new_std) = old, new
        squares = std.square() + (mean - new_mean).square()
        return ((new_std / std).log() + squares / (2 * new_std.square()) - 0.5).sum(-1)


def make_head(actions):
    """The action distribution for `envs.Env.actions`: a count, or a box."""
    return Categorical(actions) if isinstance(actions, int) else Gaussian(len(actions[0]))


def actor(params, head, xp=numpy):
    """The policy under params (S, M, ...) as act(obs (B, K, D), noise (B, K, size)) -> actions (B, K[, A]).

    All are arrays of xp: numpy on a CPU, torch on a GPU.
    """
    policy = acting(params, "policy", xp)
    return lambda obs, noise: head.sample(params, policy(obs), noise, xp)


# --- what the losses are made of ---


def flat(x):
    """(S, M, K, H, ...) -> (B, K·H, ...)."""
    return x.flatten(0, 1).flatten(1, 2)


def policy_outputs(params, trajectories):
    """The policy's outputs at every observation: (B, K·H, size)."""
    return mlp(params, "policy")(flat(trajectories["obs"]))


def log_probs(params, trajectories, head):
    """log π(aₜ|sₜ): (S, M, K, H)."""
    outputs, actions = policy_outputs(params, trajectories), flat(trajectories["actions"])
    return head.log_prob(params, outputs, actions).view(trajectories["mask"].shape)


def discounted_sums(x, discount):
    """Σ_{u ≥ t} discountᵘ⁻ᵗ x_u along the last axis of x (S, M, K, H), as one product with an (H, H) matrix instead of
    a loop."""
    rows = padded(x, 4, 1)  # (S, M, K or more, H): a product of fewer than four rows has other bits
    tasks = rows.reshape(-1, *rows.shape[-2:])
    sums = tasks @ discounts(x.shape[-1], discount, x.dtype, x.device).expand(len(tasks), -1, -1)
    return sums.view_as(rows)[..., : x.shape[-2], :]


@lru_cache(maxsize=8)
def discounts(horizon, discount, dtype, device):
    """The matrix of discountᵘ⁻ᵗ, from u (row) to t (column), 0 where u < t: (H, H)."""
    steps = torch.arange(horizon, device=device)
    ahead = steps[:, None] - steps
    return torch.where(ahead >= 0, float(discount) ** ahead.clamp(min=0).to(dtype), 0.0)


ROUNDING = 32  # units in the last place: what a mean over many trajectories and sums over many steps leave of nothing


def whiten(x, mask, baseline="task", obs=None):
    """x (S, M, K, H) less a baseline, over the standard deviation of that on the valid steps of each task; padding
    becomes 0, and so does a task whose deviation is below the rounding of x: there is nothing to learn from. The result
    is held constant in every derivative, so no estimator's Hessian is exact under whitening.

    task: the task's mean. step: each time step's mean over the K trajectories first: rewards to go shrink as time runs
    out whatever the policy does, and that trend then is no longer taken for good and bad actions. Both means include
    the trajectory that they are subtracted from, so the expected gradient (before the division) is a little short. For
    K trajectories of T steps the reward of step u loses a share of 1/K under "step", of (u + 1)/(T K) under "task".
    linear: `linear_baseline` of obs (S, M, K, H, D), which leaves the trajectory out: no such factor, so no mean is
    subtracted after it.
    Raises ValueError for K = 1 under "step" and "linear".
    """
    if baseline != "task" and x.shape[2] == 1:
        raise ValueError(f"baseline {baseline!r} compares trajectories of a task, and there is one; give 2 or more")
    mask = mask.to(x)
    count = mask.sum((2, 3), keepdim=True).clamp(min=1)
    if baseline == "linear":
        centred = (x - linear_baseline(x, mask, obs)) * mask
    else:
        centred = x
        if baseline == "step":
            centred = x - (x * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
        centred = (centred - (centred * mask).sum((2, 3), keepdim=True) / count) * mask
    std, size = (((y * mask).square().sum((2, 3), keepdim=True) / count).sqrt() for y in (centred, x))
    constant = std <= ROUNDING * torch.finfo(x.dtype).eps * size  # not a number is not
    return torch.where(constant, 0.0, centred / (std + 1e-8))


def linear_baseline(x, mask, obs, ridge=1e-5):
    """b(s, t), the least-squares fit to x on (s, s², t, t², t³, 1) of Duan et al. 2016: (S, M, K, H).

    For each trajectory it is fitted to the task's other K − 1: a fit to its own actions' returns would take part of
    the gradient away. Observations are clipped to ±10, as usual there, and predictions to the range of what was fitted,
    since a cubic in t runs away behind the others' ends. The ridge is that of features scaled to a mean square of 1, so
    their units do not matter. In float64: these features are nearly collinear.
    """
    num_trajectories, horizon = x.shape[2:]
    time = (torch.arange(horizon, device=x.device) / 100).to(x).expand_as(x)  # in t/H padding would change the rounding
    obs = obs.clamp(-10, 10)
    features = torch.cat([obs, obs**2, torch.stack([time, time**2, time**3, torch.ones_like(x)], -1)], -1)
    features = features.double() * mask.unsqueeze(-1)  # (S, M, K, H, F)
    products, targets = features.mT @ features, features.mT @ x.double().unsqueeze(-1)  # (S, M, K, F, F), (.., F, 1)
    own = torch.eye(num_trajectories, dtype=torch.bool, device=x.device)
    products, targets = ((~own).to(y) @ y.flatten(3) for y in (products, targets))  # of the others: (S, M, K, F·F), ..
    products, targets = products.unflatten(3, 2 * features.shape[-1:]), targets.unsqueeze(-1)
    squares = products.diagonal(dim1=-2, dim2=-1)  # (S, M, K, F); the last feature's are the number of steps
    squares = torch.where(squares > 0, squares / squares[..., -1:], 1.0)
    # solve_ex, since solve would end all runs where one is not finite
    weights = torch.linalg.solve_ex(products + ridge * squares.diag_embed(), targets).result
    low, high = (
        (sign * torch.where(mask > 0, sign * x, math.inf).amin(3)).unsqueeze(2).masked_fill(own, sign * math.inf)
        for sign in (1, -1)
    )  # (S, M, K, K): of each trajectory's others
    predictions = (features @ weights).squeeze(-1).to(x)
    return predictions.clamp(low.amin(3).unsqueeze(-1), high.amax(3).unsqueeze(-1))


def weigh(x, trajectories, advantages, baseline, gamma):
    """The advantages by which log-probabilities are weighed, from returns to go (or GAE) x (S, M, K, H).

    whitened: see `whiten`; γᵗ is dropped, as is usual. raw: γᵗ x; of returns to go this gives an unbiased gradient of
    J = E Σₜ γᵗ rₜ (Eq. 1b).
    """
    mask = trajectories["mask"]
    if advantages == "raw":
        return x * mask * gamma ** torch.arange(x.shape[3], device=x.device).to(x)
    return whiten(x, mask, baseline, trajectories["obs"])


def surrogate(log_probs, advantages, mask, estimator, old=None, clip=None):
    """A loss (S, M) whose gradient is the policy gradient −Σₜ Aₜ ∇log πₜ: time summed, trajectories averaged.

    log_probs, advantages, mask: (S, M, K, H). The estimators share that gradient and differ in their Hessian, which
    second-order meta-gradients need:
    naive: log π · A drops the ∇log π ∇log πᵀ terms: wrong Hessian, kept to compare with other codebases.
    lvc:   π/stop(π) · A has those of a single step: low variance, small bias (Rothfuss et al. 2018).
    dice:  also those of steps before: with raw advantages the exact Hessian in expectation, highest variance (Foerster
           et al. 2018, in the causal form Σₜ Aₜ (□_{≤t} − □_{<t}) of Farquhar et al. 2019, where □ = Π π/stop(π)).
    Whitened advantages depend on θ too, through the baseline and σ, and are held constant: no Hessian is exact then.
    old: log π_old (S, M, K, H) of the policy that drew the trajectories; the loss then is −Σₜ rₜAₜ, r = π/π_old, which
    is lvc at π = π_old. clip: ε of −Σₜ min(rₜAₜ, rₜ clipped to 1 ± ε times Aₜ)  (Schulman et al. 2017).
    Raises ValueError for an old policy with another estimator than lvc.
    """
    if old is not None and estimator != "lvc":
        raise ValueError(f"estimator {estimator!r} has no likelihood ratio to an older policy; give 'lvc'")
    log_probs = log_probs * mask
    if old is not None:
        weights = (log_probs - old * mask).exp()
        if clip is not None:
            gains = torch.minimum(weights * advantages, weights.clamp(1 - clip, 1 + clip) * advantages)
            return -(gains * mask).sum(-1).mean(-1)
    elif estimator == "naive":
        weights = log_probs
    elif estimator == "lvc":
        weights = (log_probs - log_probs.detach()).exp()
    else:
        past = log_probs.cumsum(-1)
        up_to = past - past.detach()
        before = up_to - (log_probs - log_probs.detach())
        weights = up_to.exp() - before.exp()
    return -(weights * advantages * mask).sum(-1).mean(-1)


ESTIMATORS = ("naive", "lvc", "dice")
BASELINES = ("task", "step", "linear")
ADVANTAGES = ("whitened", "raw")


# --- the loss, and the estimates of advantages that it is made with ---


def pg(trajectories, values, gamma, gae_lambda):
    """Policy gradient: returns to go as advantages."""
    rewards = trajectories["rewards"] * trajectories["mask"]
    return {"advantages": discounted_sums(rewards, gamma)}


def ac(trajectories, values, gamma, gae_lambda):
    """Actor-critic: GAE(λ) as advantages, and as the critic's targets its λ-returns.

    values: V(s) (S, M, K, H), and V of the last observation (S, M, K), which counts where an episode was cut off; one
    that terminated is worth nothing from there on.
    """
    values, last_values = values
    mask = trajectories["mask"]
    last_values = last_values.masked_fill(trajectories["terminated"], 0.0).unsqueeze(-1)
    next_values = torch.cat([values[..., 1:], last_values], -1)
    is_last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    next_values = torch.where(is_last, last_values, next_values)
    advantages = gae(trajectories["rewards"], values, next_values, mask, gamma, gae_lambda)
    return {"advantages": advantages, "targets": advantages + values}


def gae(rewards, values, next_values, mask, gamma, gae_lambda):
    """Generalised advantage estimation Aₜ = Σᵤ (γλ)ᵘ⁻ᵗ (r_u + γ V(s_{u+1}) − V(s_u))  (Schulman et al. 2016)."""
    return discounted_sums((rewards + gamma * next_values - values) * mask, gamma * gae_lambda)


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES."""

    estimates: Callable  # (trajectories, values, gamma, gae_lambda) -> advantages, and a critic's targets
    critic: bool = False  # whether it has V(s), the MLP `critic`


LOSSES = {"pg": Loss(pg), "ac": Loss(ac, critic=True)}  # by --rl


def loss(
    params, trajectories, head, rl, gamma, estimator,
    baseline="task", gae_lambda=0.95, advantages="whitened", clip=None,
):  # fmt: skip
    """The `surrogate` of the policy gradient, and ½ the critic's mean squared error to its targets: (S, M).

    rl: a key of LOSSES; the rest as in `surrogate`, `whiten` and `weigh`. Of trajectories that another policy drew,
    `as_drawn`: the likelihood-ratio loss, with the advantages and targets of that time.
    """
    mask = trajectories["mask"]
    values = state_values(params, trajectories) if LOSSES[rl].critic else None
    drawn = trajectories.get("drawn") or estimates(
        params, trajectories, values, rl, gamma, baseline, gae_lambda, advantages
    )
    logs = log_probs(params, trajectories, head)
    policy_loss = surrogate(logs, drawn["advantages"], mask, estimator, drawn.get("log_probs"), clip)
    if values is None:
        return policy_loss
    squared_errors = (values - drawn["targets"]).square() * mask
    return policy_loss + 0.5 * squared_errors.sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)


def state_values(params, trajectories):
    """V(sₜ): (S, M, K, H)."""
    return mlp(params, "critic")(flat(trajectories["obs"])).view(trajectories["mask"].shape)


@torch.no_grad()
def estimates(params, trajectories, values, rl, gamma, baseline, gae_lambda, advantages):
    """The advantages as the loss weighs log-probabilities with them, and what else the row of LOSSES gives."""
    if values is not None:
        last_values = mlp(params, "critic")(trajectories["last_obs"].flatten(0, 1))
        values = values.detach(), last_values.view(values.shape[:3])
    found = LOSSES[rl].estimates(trajectories, values, gamma, gae_lambda)
    return found | {"advantages": weigh(found["advantages"], trajectories, advantages, baseline, gamma)}


# --- several steps on the same trajectories: ProMP (Rothfuss et al. 2019) ---


@torch.no_grad()
def as_drawn(params, trajectories, head, rl, gamma, baseline="task", gae_lambda=0.95, advantages="whitened"):
    """The trajectories with an entry `drawn`: what stays as it was under params, which drew them, in later losses.

    Its log π and π itself, the advantages, and the targets of an actor-critic.
    """
    values = state_values(params, trajectories) if LOSSES[rl].critic else None
    kept = {
        "log_probs": log_probs(params, trajectories, head),
        "policy": head.distribution(params, policy_outputs(params, trajectories)),
    }
    kept |= estimates(params, trajectories, values, rl, gamma, baseline, gae_lambda, advantages)
    return trajectories | {"drawn": kept}


def kl(params, trajectories, head):
    """KL(π_old ‖ π) of the policy π under params to π_old, which drew the trajectories, `as_drawn`: (S, M).

    Summed over time and averaged over trajectories, as the losses are.
    """
    mask = trajectories["mask"]
    new = head.distribution(params, policy_outputs(params, trajectories))
    return (head.kl(trajectories["drawn"]["policy"], new).view(mask.shape) * mask).sum(-1).mean(-1)


OPTIONS = ("rl", "gamma", "estimator", "baseline", "gae_lambda", "advantages")  # of the loss
