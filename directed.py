"""Directed-MAML's one idea: a first-order step on a medium task before each step of any meta-learner.

Needs torch alone; copy this file into your project. Algorithm 1 of Zhang, Yan, Liu 2025 (arXiv 2510.00212).
"""

import torch


def directed(meta_learner, delta):
    """Put the δ-step θ ← θ − δ ∇L_med(θ)  (Algorithm 1, line 5; L = −J) before `meta_learner`, which stays as it is.

    meta_learner: any function (theta, ...) that fills `.grad` of theta's leaves, e.g. those of maml.py.
    delta: step size δ ≥ 0, a number or a tensor (S,): one for each run.
    Returns a function (theta, medium_loss, ...): theta a dict of leaves (S, 1, ...), medium_loss: params -> (S, 1),
    and everything else is handed to `meta_learner`. The step is in place: optimisers keep their leaves and state.
    Raises ValueError where δ is negative or not finite.
    """
    delta = torch.as_tensor(delta, dtype=torch.float64)
    if delta.dim() > 1 or not ((delta >= 0) & delta.isfinite()).all():
        raise ValueError(f"directed: delta is {delta.tolist()}; expected a finite number >= 0, or one for each run")

    def directed_meta_learner(theta, medium_loss, *args, **kwargs):
        gradients = torch.autograd.grad(medium_loss(theta).sum(), list(theta.values()))
        with torch.no_grad():
            for p, gradient in zip(theta.values(), gradients, strict=True):
                step_size = delta.to(p).reshape(-1, *[1] * (p.dim() - 1))  # (S, 1, ...) or (1, 1, ...)
                p -= step_size * gradient
        return meta_learner(theta, *args, **kwargs)

    return directed_meta_learner
