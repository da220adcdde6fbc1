"""iMAML: a meta-learner like those of maml.py, on the same `task_loss` and with the same axes.

Needs torch and maml.py; copy both files into your project.
"""

import torch

from maml import adapt, expand, loss_per_task


def proximal(task_loss, theta, lambda_):
    """The objective of iMAML's inner loop, L_Tᵢ(θ') + λ/2 ‖θ' − θ‖²  (Rajeswaran et al. 2019, Eq. 3), as a task_loss.

    theta: dict of tensors (S, 1, ...) or (S, M, ...), held constant; so new tasks are adapted to as in training by
    adapt(start, proximal(task_loss, start, lambda_), alpha, inner_steps) with start = expand(theta, num_tasks).
    Raises ValueError where λ is not positive.
    """
    if not lambda_ > 0:
        raise ValueError(f"proximal: lambda_ is {lambda_}; expected a number > 0 (large: θ' stays near θ)")
    anchor = [p.detach() for p in theta.values()]

    def proximal_loss(params):
        distance = [p - a for p, a in zip(params.values(), anchor, strict=True)]
        return loss_per_task(task_loss, params) + lambda_ / 2 * flatten(distance).square().sum(2)

    return proximal_loss


def imaml(theta, task_loss, alpha, num_tasks, inner_steps=5, lambda_=1.0, cg_steps=5):
    """The implicit meta-gradient Σᵢ (I + ∇²L_Tᵢ(θ'ᵢ)/λ)⁻¹ ∇L_Tᵢ(θ'ᵢ)  (Rajeswaran et al. 2019, Eq. 6); fills `.grad`.

    θ'ᵢ: `inner_steps` plain steps on the `proximal` objective. The meta-gradient is exact at its minimum, however that
    was found; α must be under 2/(λ + the largest curvature), and memory does not grow with inner_steps.
    theta: dict of leaves (S, 1, ...); alpha as in `adapt`, but never learned.
    task_loss is called `inner_steps` + 2 times: for the Hessian once, whatever `cg_steps`, and for the query last.
    cg_steps: steps of conjugate gradients, a Hessian-vector product each; 0 takes ∇L(θ'ᵢ) alone.
    """
    start = expand(theta, num_tasks)
    adapted = adapt(start, proximal(task_loss, start, lambda_), alpha, inner_steps, second_order=False)
    adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    hessian = hessian_of(loss_per_task(task_loss, adapted), list(adapted.values()))
    query_loss = loss_per_task(task_loss, adapted)
    gradient = flatten(torch.autograd.grad(query_loss.sum(), list(adapted.values())))  # (S, M, N)
    solution = conjugate_gradients(lambda direction: direction + hessian(direction) / lambda_, gradient, cg_steps)
    sizes = [p[0, 0].numel() for p in theta.values()]
    for p, part in zip(theta.values(), solution.sum(1, keepdim=True).split(sizes, 2), strict=True):
        p.grad = part.reshape(p.shape)


def flatten(tensors):
    """The N numbers of all parameters of each task in one row: list of tensors (S, M, ...) -> (S, M, N)."""
    return torch.cat([t.reshape(*t.shape[:2], -1) for t in tensors], 2)


def hessian_of(loss, params):
    """The function v -> ∇²L v, both (S, M, N), of losses (S, M) in params (a list): the gradient of ∇L · v."""
    gradient = flatten(torch.autograd.grad(loss.sum(), params, create_graph=True))

    def product(v):
        return flatten(torch.autograd.grad(gradient, params, v, retain_graph=True, materialize_grads=True))

    return product


def conjugate_gradients(product, b, steps):
    """x ≈ A⁻¹b after `steps` steps of conjugate gradients (Hestenes, Stiefel 1952), for every run and task at once.

    product: v (S, M, N) -> Av, A symmetric, one for each run and task; b: (S, M, N).
    A task stops where vᵀAv ≤ 0 along its direction v: its Hessian is indefinite and λ too small. It keeps the x it has,
    or b if that was the first direction.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = (residual * residual).sum(2, keepdim=True)  # (S, M, 1)
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(2, keepdim=True)
        convex = curvature > 0
        step = torch.where(convex, squared / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * image
        previous, squared = squared, (residual * residual).sum(2, keepdim=True)
        direction = torch.where(convex, residual + squared / previous * direction, 0.0)  # 0 has no curvature: it stays
    return torch.where((x != 0).any(2, keepdim=True), x, b)
