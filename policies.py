"""MLP policy and critic as one dict of tensors, and the policy-gradient and actor-critic losses on it.

Axes: S runs, M tasks, K trajectories, H time steps, D features; B = S·M where runs and tasks are flattened. Needs
torch alone. Trajectories, as `envs.rollout` returns them, are a dict with

    obs (S, M, K, H, D)    actions (S, M, K, H) or (S, M, K, H, A)    rewards (S, M, K, H)
    mask (S, M, K, H)      True while the episode runs; entries after its end are padding and are ignored
    last_obs (S, M, K, D)  the observation after the last step        terminated (S, M, K)  False: truncated there
"""

import math
from functools import partial

import numpy
import torch

# --- networks ---


def init_mlp(name, sizes, generators):
    """Parameters `name.i.weight` (S, 1, in, out) and `name.i.bias` (S, 1, 1, out), one run for each generator.

    Drawn like torch.nn.Linear's: uniform within ±1/√in.
    """
    params = {}
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        for kind, rows in (("weight", n_in), ("bias", 1)):
            draws = torch.stack([torch.rand(1, rows, n_out, generator=g) for g in generators])
            params[f"{name}.{i}.{kind}"] = (2 * draws - 1) / math.sqrt(n_in)
    return params


def init(obs_dim, head, generators, hidden=(64, 64), critic=False):
    """θ: a dict of leaves (S, 1, ...) for S = len(generators) runs; `critic` adds V(s) as a second MLP."""
    theta = init_mlp("policy", [obs_dim, *hidden, head.size], generators)
    if isinstance(head, Gaussian):
        theta["policy.log_std"] = torch.zeros(len(generators), 1, 1, head.size)
    if critic:
        theta |= init_mlp("critic", [obs_dim, *hidden, 1], generators)
    return {name: p.requires_grad_() for name, p in theta.items()}


def mlp(params, name, xp=torch):
    """The tanh MLP `name` of params (S, M, ...) as a function x (B, N, D) -> (B, N, out).

    xp: torch; or numpy for acting on a CPU, where a call on such small arrays costs a quarter of torch's.
    """
    weights, biases = (
        [p.reshape(-1, *p.shape[2:]) for key, p in params.items() if key.startswith(name) and key.endswith(kind)]
        for kind in (".weight", ".bias")
    )
    if xp is not torch:
        return partial(forward_numpy, weights, biases)

    # tanh(z) = 2σ(2z) − 1, with its constants moved into the weights: σ takes a third of the time of tanh on a CPU.
    weights = [weight.contiguous() for weight in weights]
    for i in range(len(weights) - 1):
        biases[i], biases[i + 1] = 2 * biases[i], biases[i + 1] - weights[i + 1].sum(1, keepdim=True)
        weights[i], weights[i + 1] = 2 * weights[i], 2 * weights[i + 1]

    def forward(x):
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight).sigmoid()
        return torch.baddbmm(biases[-1], x, weights[-1])

    return forward


def forward_numpy(weights, biases, x):
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight
        x += bias
        if i < len(weights) - 1:
            numpy.tanh(x, out=x)
    return x


# --- action distributions ---


class Categorical:
    """Discrete actions 0 .. size−1 by softmax over the policy's outputs; actions (B, N), noise (B, N, size)."""

    def __init__(self, size):
        self.size = size

    def sample(self, params, outputs, noise, xp=torch):
        """The Gumbel-max trick: argmax(logits + Gumbel noise) is distributed as softmax(logits)."""
        return (outputs + noise).argmax(-1)

    def log_prob(self, params, outputs, actions):
        return outputs.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


class Gaussian:
    """Actions in a box, scaled to [−1, 1] per dimension: N(mean(s), σ²), σ learned and the same in every state.

    Actions and noise are (B, N, size). The environment clips what falls outside the box; the density is that of the
    action before clipping, so the policy gradient stays exact. σ begins at 1 and never acts smaller than `min_std`:
    the gradient grows as 1/σ, the Hessian as 1/σ², and constant SGD steps blow up when σ shrinks further.
    """

    def __init__(self, size, min_std=0.5):
        self.size = size
        self.min_std = min_std

    def log_std(self, params, xp=torch):  # (B, 1, size)
        log_std = params["policy.log_std"]
        return xp.clip(log_std.reshape(-1, *log_std.shape[2:]), math.log(self.min_std), None)

    def sample(self, params, outputs, noise, xp=torch):
        return outputs + xp.exp(self.log_std(params, xp)) * noise

    def log_prob(self, params, outputs, actions):
        log_std = self.log_std(params)
        z = (actions - outputs) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def make_head(actions):
    """The action distribution for `envs.Env.actions`: a count, or a box."""
    return Categorical(actions) if isinstance(actions, int) else Gaussian(len(actions[0]))


def actor(params, head, xp=numpy):
    """The policy under params (S, M, ...) as act(obs (B, K, D), noise (B, K, size)) -> actions (B, K[, A]).

    All are arrays of xp: numpy on a CPU, torch on a GPU.
    """
    policy = mlp(params, "policy", xp)
    return lambda obs, noise: head.sample(params, policy(obs), noise, xp)


# --- what the losses are made of ---


def log_probs(params, trajectories, head):
    """log π(aₜ|sₜ): (S, M, K, H)."""
    obs, actions = (trajectories[key].flatten(0, 1).flatten(1, 2) for key in ("obs", "actions"))  # (B, K·H, ...)
    return head.log_prob(params, mlp(params, "policy")(obs), actions).view(trajectories["mask"].shape)


def discounted_sums(x, discount):
    """Σ_{u ≥ t} discountᵘ⁻ᵗ x_u along the last axis, as one product with an (H, H) matrix instead of a loop."""
    steps = torch.arange(x.shape[-1], device=x.device)
    ahead = steps[:, None] - steps  # (H, H): from t (column) to u (row)
    return x @ torch.where(ahead >= 0, float(discount) ** ahead.clamp(min=0).to(x), 0.0)


def whiten(x, mask, baseline="task"):
    """Zero mean and unit variance over the valid steps of each task (S, M); padding becomes 0.

    baseline "step" takes from every step its own mean over the K trajectories first: rewards to go shrink as time
    runs out whatever the policy does, and that trend then is no longer taken for good and bad actions.
    """
    mask = mask.to(x)
    if baseline == "step":
        x = x - (x * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
    count = mask.sum((2, 3), keepdim=True).clamp(min=1)
    centred = (x - (x * mask).sum((2, 3), keepdim=True) / count) * mask
    std = (centred.square().sum((2, 3), keepdim=True) / count).sqrt()
    return centred / (std + 1e-8)


def surrogate(log_probs, advantages, mask, estimator):
    """A loss (S, M) whose gradient is the policy gradient −∇J: time summed, trajectories averaged.

    log_probs, advantages, mask: (S, M, K, H). The estimators share that gradient and differ in their Hessian, which
    second-order meta-gradients need:
    naive: log π · A drops the ∇log π ∇log πᵀ terms: wrong Hessian, kept to compare with other codebases.
    lvc:   π/stop(π) · A has those of a single step: low variance, small bias (Rothfuss et al. 2018).
    dice:  also those of steps before: unbiased, highest variance (Foerster et al. 2018, in the causal form
           Σₜ Aₜ (□_{≤t} − □_{<t}) of Farquhar et al. 2019, where □ = Π π/stop(π)).
    """
    log_probs = log_probs * mask
    if estimator == "naive":
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
BASELINES = ("task", "step")


# --- the losses: params, trajectories -> (S, M) ---


def pg(params, trajectories, head, gamma, estimator, baseline="task", gae_lambda=None):
    """Policy gradient: rewards to go, whitened per task, summed over time, averaged over trajectories."""
    mask = trajectories["mask"]
    returns_to_go = discounted_sums(trajectories["rewards"] * mask, gamma)
    return surrogate(log_probs(params, trajectories, head), whiten(returns_to_go, mask, baseline), mask, estimator)


def gae(rewards, values, next_values, mask, gamma, gae_lambda):
    """Generalised advantage estimation Aₜ = Σᵤ (γλ)ᵘ⁻ᵗ (r_u + γ V(s_{u+1}) − V(s_u))  (Schulman et al. 2016)."""
    return discounted_sums((rewards + gamma * next_values - values) * mask, gamma * gae_lambda)


def ac(params, trajectories, head, gamma, estimator, baseline="task", gae_lambda=0.95):
    """Actor-critic: whitened GAE(λ) advantages, plus ½ the critic's mean squared error to its λ-returns.

    A terminated episode is worth nothing from there on; a truncated one is worth V of its last observation.
    """
    mask, critic = trajectories["mask"], mlp(params, "critic")
    values = critic(trajectories["obs"].flatten(0, 1).flatten(1, 2)).view(mask.shape)
    with torch.no_grad():
        last_value = critic(trajectories["last_obs"].flatten(0, 1)).view(mask.shape[:3])
        last_value = last_value.masked_fill(trajectories["terminated"], 0.0).unsqueeze(-1)
        next_values = torch.cat([values[..., 1:], last_value], -1)
        is_last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
        next_values = torch.where(is_last, last_value, next_values)
        advantages = gae(trajectories["rewards"], values, next_values, mask, gamma, gae_lambda)
        targets = advantages + values
    count = mask.sum((2, 3)).clamp(min=1)
    value_loss = 0.5 * ((values - targets).square() * mask).sum((2, 3)) / count
    return (
        surrogate(log_probs(params, trajectories, head), whiten(advantages, mask, baseline), mask, estimator)
        + value_loss
    )


LOSSES = {"pg": pg, "ac": ac}
