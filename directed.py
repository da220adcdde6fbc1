"""Directed-MAML's one idea: a first-order step on a medium task before each step of any meta-learner.

Needs torch alone; copy this file into your project. Algorithm 1 of Zhang, Yan, Liu 2025 (arXiv
2510.00212).
"""

import torch


def directed(meta_learner, delta):
    """Put the δ-step θ ← θ − δ ∇L_med(θ)  (Algorithm 1, line 5; L = −J) before `meta_learner`.

    meta_learner: any function (theta, task_loss, ...) that fills `.grad` of theta's leaves, e.g.
    those of maml.py.
    delta: step size δ ≥ 0, a number or a tensor (S,): one for each run, read anew at every step.
    Returns a function (theta, medium_loss, task_loss, ...): theta a dict of leaves (S, 1, ...),
    medium_loss: params -> (S, 1), and the rest is handed to `meta_learner`. The step is in place:
    optimisers keep leaves and state.
    Raises ValueError, and leaves θ as it was, where δ is negative, not finite or not one for each
    run, a parameter has no gradient, or the medium loss is missing or not (S, 1). Of a GPU's tensor δ
    the shape alone is looked at.
    """
    given = torch.as_tensor(delta, dtype=torch.float64)
    on_gpu = given.device.type != "cpu"  # to look at its values the host would have to wait
    in_range = on_gpu or ((given >= 0) & given.isfinite()).all()
    if given.dim() > 1 or not in_range:
        raise ValueError(f"directed: delta is {given.tolist()}; expected a finite number >= 0, or one for each run")
    delta = given if isinstance(delta, (list, tuple)) else delta

    def directed_meta_learner(theta, medium_loss, task_loss=None, *args, **kwargs):
        if not callable(task_loss):
            expected = "(theta, medium_loss, task_loss, ...): the medium task's loss comes first"
            raise ValueError(f"directed: task_loss is {task_loss!r}, not a function; expected {expected}")
        gradients = medium_gradients(theta, medium_loss)
        runs = len(gradients[0])
        if given.numel() not in (1, runs):
            raise ValueError(f"directed: delta is {given.tolist()} for {runs} runs; expected a number, or one for each")
        with torch.no_grad():
            for p, gradient in zip(theta.values(), gradients, strict=True):
                p -= of_each_run(delta, p) * gradient
        return meta_learner(theta, task_loss, *args, **kwargs)

    return directed_meta_learner


def of_each_run(delta, p):
    """A number, or a tensor (S,), in the shape that multiplies a parameter (S, 1, ...)."""
    if not isinstance(delta, torch.Tensor):
        return delta
    return delta.to(p).reshape(-1, *[1] * (p.dim() - 1))


def medium_gradients(theta, medium_loss):
    """∇L_med(θ), (S, 1, ...) for each parameter. Raises ValueError where a shape is not (S, 1, ...)."""
    loss = medium_loss(theta)
    for name, p in theta.items():
        if not p.requires_grad:
            problem = f"parameter {name!r} has requires_grad=False"
            raise ValueError(f"directed: {problem}; make it a leaf by requires_grad_()")
        if loss.dim() != 2 or loss.shape[1] != 1 or p.shape[:2] != loss.shape:
            raise ValueError(
                f"directed: the medium loss has shape {tuple(loss.shape)} and parameter {name!r} "
                f"{tuple(p.shape)}; expected a loss (S, 1), one number a run, and parameters (S, 1, ...)"
            )
    gradients = torch.autograd.grad(loss.sum(), list(theta.values()), allow_unused=True)
    for name, gradient in zip(theta, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"directed: the medium loss does not use parameter {name!r}; leave it out")
    return gradients
