"""The conventional design, to measure against: a Python loop over tasks, `torch.func.functional_call` on an nn.Module,
and gymnasium's own vector CartPole with K lanes. Independent of the project's code.

Trajectories are obs (H, K, 4), actions (H, K) and rewards (H, K); nothing terminates, so there is no mask.
"""

import math
from functools import partial

import gymnasium
import torch
from torch.func import functional_call

Categorical = partial(torch.distributions.Categorical, validate_args=False)  # in its favour: a tenth of its time


def make_policy(hidden):
    return torch.nn.Sequential(
        torch.nn.Linear(4, hidden), torch.nn.Tanh(),
        torch.nn.Linear(hidden, hidden), torch.nn.Tanh(),
        torch.nn.Linear(hidden, 2),
    )  # fmt: skip


def make_sampler(policy, num_trajectories, horizon):
    """sample(params, gravity) -> K trajectories of exactly `horizon` steps; `sample.env_steps` counts them."""
    env = gymnasium.make_vec("CartPole-v1", num_trajectories)
    env.x_threshold = env.theta_threshold_radians = math.inf  # nothing terminates, so nothing is reset on the way

    def sample(params, gravity):
        env.gravity = gravity
        observed, steps = env.reset()[0], []
        with torch.no_grad():
            for _ in range(horizon):
                obs = torch.from_numpy(observed)
                action = Categorical(logits=functional_call(policy, params, obs)).sample()
                observed, reward, terminated, truncated, _ = env.step(action.numpy())
                assert not (terminated.any() or truncated.any())
                steps.append((obs, action, torch.from_numpy(reward)))
                sample.env_steps += len(reward)
        return [torch.stack(x) for x in zip(*steps, strict=True)]

    sample.env_steps = 0
    return sample


def policy_loss(policy, params, trajectories, gamma):
    """−J: rewards to go, whitened, times π/stop(π) ("lvc"), summed over time, averaged over trajectories."""
    obs, actions, rewards = trajectories
    returns_to_go, ahead = [], 0.0
    for reward in reversed(rewards.unbind()):
        ahead = reward + gamma * ahead
        returns_to_go.append(ahead)
    returns_to_go = torch.stack(returns_to_go[::-1])
    advantages = (returns_to_go - returns_to_go.mean()) / (returns_to_go.std(correction=0) + 1e-8)
    log_probs = Categorical(logits=functional_call(policy, params, obs)).log_prob(actions)
    return -((log_probs - log_probs.detach()).exp() * advantages).sum(0).mean()


def meta_gradient(policy, sample, gravities, alpha, gamma, second_order=True):
    """MAML, or FOMAML where not second_order, one task after the other; fills `.grad` of the policy's parameters."""
    policy.zero_grad()
    theta = dict(policy.named_parameters())
    for gravity in gravities:
        loss = policy_loss(policy, theta, sample(theta, gravity), gamma)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=second_order)
        adapted = {name: p - alpha * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        policy_loss(policy, adapted, sample(adapted, gravity), gamma).backward()


def medium_step(policy, sample, gravity, delta, gamma):
    """Directed-MAML's plain step on the medium task."""
    theta = dict(policy.named_parameters())
    loss = policy_loss(policy, theta, sample(theta, gravity), gamma)
    gradients = torch.autograd.grad(loss, list(theta.values()))
    with torch.no_grad():
        for p, g in zip(theta.values(), gradients, strict=True):
            p -= delta * g
