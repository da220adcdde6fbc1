"""Gradient-based meta-learners on any loss: MAML, FOMAML, Meta-SGD, MAML++ and Reptile.

Needs torch alone; copy this file into your project. Everything is batched: parameters are a dict of tensors that
start with (S, 1), S independent runs (seeds, hyper-parameters, or just 1), and M tasks adapt at once, without a loop.

The one abstraction: `task_loss(params) -> (S, M)` draws fresh data for its M tasks *under the given parameters*
(each (S, M, ...)) and returns a differentiable loss L = −J. It is called anew before every gradient step.

A meta-learner fills `.grad` of the parameters with its meta-gradient, and any torch optimiser takes the step:

    theta = {name: torch.stack([...])[:, None].requires_grad_() for ...}  # leaves (S, 1, ...)
    optimizer = torch.optim.SGD(theta.values(), lr=beta)
    for epoch in range(epochs):
        maml(theta, task_loss, alpha, num_tasks)
        optimizer.step()
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha)  # to new tasks, with the new tasks' loss

Losses are summed over runs and tasks, never averaged, so runs do not touch each other; the gradient of the expanded
view sums over tasks by itself, which is the sum of Eq. 2b. Equations: Zhang, Yan, Liu 2025 (arXiv 2510.00212).
"""

from functools import partial

import torch


def expand(theta, num_tasks):
    """θ (S, 1, ...) seen once per task: (S, M, ...), a view through which gradients sum over the tasks.

    Raises ValueError where a parameter has no axes (S, 1) in front.
    """
    for name, p in theta.items():
        if p.dim() < 2 or p.shape[1] != 1:
            raise ValueError(
                f"expand: parameter {name!r} has shape {tuple(p.shape)}; expected (S, 1, ...), S runs: stack their "
                "parameters and add the axis of the tasks, torch.stack([...])[:, None], or p[None, None] for one run"
            )
    return {name: p.expand(-1, num_tasks, *p.shape[2:]) for name, p in theta.items()}


def adapt(theta, task_loss, alpha, inner_steps=1, second_order=True, losses=None):
    """The inner loop for every task at once: θ'ᵢ = θ − α ∇L_Tᵢ(θ)  (Eq. 2a; L = −J), `inner_steps` times.

    theta: dict of tensors (S, M, ...), from `expand`; task_loss: params -> losses (S, M).
    alpha: a number, a tensor (S, 1), one for each run, or a dict of tensors that broadcast against theta's (Meta-SGD),
    or with an axis of inner steps after these two, (S, 1, steps, ...) (MAML++); later steps take the last one's.
    second_order: keep the step in the graph, so that a gradient through θ' sees ∇²L; False detaches it (FOMAML).
    inner_steps: 0 or more, each on data that task_loss draws anew; 0 returns theta itself.
    losses: a list, to which the loss before every step is appended with its graph, also where steps are detached.
    Returns θ' (S, M, ...). Raises ValueError where tasks would mix (see `loss_per_task`), or alpha or inner_steps is
    none of these.
    """
    if inner_steps < 0 or inner_steps != int(inner_steps):
        raise ValueError(f"adapt: inner_steps is {inner_steps}; expected a whole number >= 0 (0: no adaptation)")
    adapted = theta
    for step in range(int(inner_steps)):
        loss = loss_per_task(task_loss, adapted)
        retain = second_order or losses is not None
        gradients = torch.autograd.grad(loss.sum(), [*adapted.values()], retain_graph=retain, create_graph=second_order)
        if losses is not None:
            losses.append(loss)
        adapted = {
            name: p - step_size(alpha, name, p, step) * gradient
            for (name, p), gradient in zip(adapted.items(), gradients, strict=True)
        }
    return adapted


def loss_per_task(task_loss, params):
    """task_loss(params), (S, M), of parameters (S, M, ...).

    Raises ValueError where a parameter or the loss has no gradient, or where a parameter does not start with the loss's
    shape: tasks would mix.
    """
    for name, p in params.items():
        if not p.requires_grad:
            raise ValueError(
                f"parameter {name!r} has requires_grad=False; expected leaves made with requires_grad_(): "
                "keep frozen parameters out of theta"
            )
    loss = task_loss(params)
    for name, p in params.items():
        if loss.dim() != 2 or p.shape[:2] != loss.shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(p.shape)} and the loss {tuple(loss.shape)}; expected a loss "
                "(S, M), one number a task, and parameters (S, M, ...): expand them first with expand(theta, num_tasks)"
            )
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient; expected one computed from the parameters, outside of no_grad()")
    return loss


def step_size(alpha, name, p, step=0):
    """What multiplies the gradient of the parameter p (S, M, ...): alpha in a shape that broadcasts against p."""
    if isinstance(alpha, dict):
        own = alpha[name]
        return own[:, :, min(step, own.shape[2] - 1)] if own.dim() == p.dim() + 1 else own
    if not isinstance(alpha, torch.Tensor) or alpha.dim() == 0:
        return alpha
    if alpha.shape != (p.shape[0], 1):
        raise ValueError(
            f"alpha is a tensor of shape {tuple(alpha.shape)} for {p.shape[0]} runs; expected a number, a tensor "
            f"({p.shape[0]}, 1), one for each run, e.g. torch.tensor([0.001, 0.01])[:, None], or a dict of tensors"
        )
    return alpha.to(p).reshape(-1, *[1] * (p.dim() - 1))  # (S, 1, ...)


def maml(theta, task_loss, alpha, num_tasks, inner_steps=1, second_order=True, step_weights=None):
    """The meta-gradient Σᵢ ∇_θ L_Tᵢ(θ'ᵢ)  (Eq. 2b), on data resampled under θ'ᵢ; fills `.grad` of theta.

    theta: dict of leaves (S, 1, ...). second_order=False takes ∇_θ' instead of ∇_θ: FOMAML (Nichol et al. 2018).
    alpha: as in `adapt`; a dict of leaves (S, 1, ...) gets its meta-gradient too: Meta-SGD (Li et al. 2017).
    inner_steps=0 is joint training, Σᵢ ∇ L_Tᵢ(θ): no adaptation, and task_loss is called once.
    step_weights: the w of Σᵢ Σⱼ wⱼ ∇_θ L_Tᵢ(θ'ᵢⱼ), θ'ᵢⱼ after j = 1, .., N inner steps: MAML++ (Antoniou et al. 2019),
    where each j has a query set. Here the loss that step j + 1 descends is the one at θ'ᵢⱼ: it is on data drawn anew
    under θ'ᵢⱼ, so no more data is needed. (A task_loss that gives all steps one support set would train on that set.)
    Raises ValueError as `adapt` does, and where step_weights is not one number for each inner step, not all 0.
    """
    given = isinstance(step_weights, torch.Tensor)  # whose values may change while the graph stays
    if step_weights is not None and (len(step_weights) != inner_steps or not (given or any(step_weights))):
        raise ValueError(
            f"maml: step_weights is {step_weights} for {inner_steps} inner steps; expected a number for each, not all 0"
        )
    losses = None if step_weights is None else []  # after 0, 1, .. steps, (S, M) each
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha, inner_steps, second_order, losses)
    loss = loss_per_task(task_loss, adapted)
    if step_weights is not None:
        loss = sum(w * after for w, after in zip(step_weights, [*losses[1:], loss], strict=True) if given or w)
    learned = [*theta.values(), *(alpha.values() if isinstance(alpha, dict) else ())]
    gradients = torch.autograd.grad(loss.sum(), learned, materialize_grads=inner_steps == 0)  # then that of α is 0
    for p, gradient in zip(learned, gradients, strict=True):
        p.grad = gradient


def reptile(theta, task_loss, alpha, num_tasks, inner_steps=5):
    """The Reptile direction θ − meanᵢ θ'ᵢ (Nichol et al. 2018), no query batch; fills `.grad` of theta.

    An SGD step of size ε then is θ ← θ + ε meanᵢ(θ'ᵢ − θ). Returns θ' (S, M, ...), on which it takes no loss, detached.
    Raises ValueError for inner_steps=0: θ would not move.
    """
    if inner_steps == 0:
        raise ValueError("reptile: inner_steps is 0, and it moves by inner steps alone; use maml for joint training")
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha, inner_steps, second_order=False)
    for name, p in theta.items():
        p.grad = (p - adapted[name].mean(dim=1, keepdim=True)).detach()
    return {name: p.detach() for name, p in adapted.items()}


def learned_alpha(theta, alpha, inner_steps=None):
    """Learned step sizes, one for each parameter, all equal to `alpha` at first: a number or a tensor (S, 1).

    Leaves (S, 1, ...) for all inner steps alike: Meta-SGD; or for each of `inner_steps`, (S, 1, steps, ...): MAML++.
    """
    learned = {name: torch.ones_like(p) * step_size(alpha, name, p) for name, p in theta.items()}
    if inner_steps is not None:
        learned = {name: torch.stack([p] * inner_steps, 2) for name, p in learned.items()}
    return {name: p.requires_grad_() for name, p in learned.items()}


def multi_step_weights(inner_steps, epoch, epochs):
    """MAML++'s `step_weights`: all 1/N in epoch 0; the last one grows linearly, and is alone from epoch `epochs` on."""
    early = max(0, epochs - epoch) / max(epochs, 1) / inner_steps
    return [early] * (inner_steps - 1) + [1 - (inner_steps - 1) * early]


META_LEARNERS = {
    "maml": maml,
    "fomaml": partial(maml, second_order=False),
    "meta-sgd": maml,  # with alpha=learned_alpha(theta, alpha), which its optimiser must know
    "reptile": reptile,
    "maml++": maml,  # with alpha=learned_alpha(theta, alpha, inner_steps) and step_weights
}
