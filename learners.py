"""iMAML, a meta-learner like those of maml.py, and Sharp-MAML, a wrapper around any of them.

Needs torch and maml.py; copy both files into your project. `task_loss` and the axes are those of maml.py.
The δ-step goes before either: directed(imaml, delta), and directed(sharp(maml, rho), delta).
"""

import torch

from maml import adapt, expand, loss_per_task


def proximal(task_loss, theta, lambda_):
    """The objective of iMAML's inner loop, L_Tᵢ(θ') + λ/2 ‖θ' − θ‖²  (Rajeswaran et al. 2019, Eq. 4), as a task_loss.

    theta: dict of tensors (S, 1, ...) or (S, M, ...), held constant; so new tasks are adapted to as in training by
    adapt(start, proximal(task_loss, start, lambda_), alpha, inner_steps) with start = expand(theta, num_tasks).
    lambda_: λ > 0, a number, or a tensor (S, 1), one for each run.
    Raises ValueError where λ is none of these.
    """
    lambda_ = torch.as_tensor(lambda_, dtype=torch.float64)
    runs = len(next(iter(theta.values())))
    known = lambda_.device.type == "cpu"  # elsewhere to look at the values would wait for them at every step
    if (known and not ((lambda_ > 0) & lambda_.isfinite()).all()) or lambda_.shape not in ((), (runs, 1)):
        raise ValueError(
            f"proximal: lambda_ is {lambda_.tolist()}; expected a finite number > 0 (large: θ' stays near θ), or a "
            f"tensor ({runs}, 1), one for each run"
        )
    anchor = {name: p.detach() for name, p in theta.items()}

    def proximal_loss(params):
        distance = [p - anchor[name] for name, p in params.items()]
        loss = loss_per_task(task_loss, params)
        return loss + lambda_.to(loss) / 2 * flatten(distance).square().sum(2)

    return proximal_loss


def imaml(theta, task_loss, alpha, num_tasks, inner_steps=5, lambda_=1.0, cg_steps=5):
    """The implicit meta-gradient Σᵢ (I + ∇²L_Tᵢ(θ'ᵢ)/λ)⁻¹ ∇L_Tᵢ(θ'ᵢ)  (Rajeswaran et al. 2019, Lemma 1).

    Fills `.grad` of theta. θ'ᵢ: `inner_steps` plain steps on the `proximal` objective, at whose minimum this is exact,
    whatever the path to it; so memory does not grow with them. Needs α < 2/(λ + the largest curvature).
    theta: dict of leaves (S, 1, ...); alpha as in `adapt`, but never learned; lambda_ as in `proximal`.
    task_loss is called `inner_steps` + 2 times: for the Hessian once, whatever `cg_steps`, and for the query last.
    cg_steps: steps of conjugate gradients, a Hessian-vector product each; 0 takes ∇L(θ'ᵢ) alone.
    Raises ValueError as `adapt` and `proximal` do, and where cg_steps is negative.
    """
    if cg_steps < 0:
        raise ValueError(f"imaml: cg_steps is {cg_steps}; expected a whole number >= 0 (0: no Hessian)")
    start = expand(theta, num_tasks)
    adapted = adapt(start, proximal(task_loss, start, lambda_), alpha, inner_steps, second_order=False)
    adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    hessian = hessian_of(loss_per_task(task_loss, adapted), list(adapted.values()))
    query_loss = loss_per_task(task_loss, adapted)
    gradient = flatten(torch.autograd.grad(query_loss.sum(), list(adapted.values())))  # (S, M, N)
    strength = torch.as_tensor(lambda_, dtype=torch.float64).to(gradient).reshape(-1, 1, 1)  # (S, 1, 1) or (1, 1, 1)
    solution = conjugate_gradients(lambda direction: direction + hessian(direction) / strength, gradient, cg_steps)
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


def sharp(meta_learner, rho):
    """The meta-gradient g taken at θ + ρ g(θ)/‖g(θ)‖ instead of at θ: Sharp-MAML_up (Abbas et al. 2022).

    meta_learner: any function (theta, task_loss, ...) that fills `.grad` of theta's leaves, e.g. those of maml.py. It
    is called twice, each time on data that task_loss draws anew; with ρ = 0 once.
    rho: radius ρ ≥ 0; the norm is over all parameters of a run, each run has its own. A learned alpha is not perturbed.
    Returns a function of the same arguments, after which theta is what it was, to the bit, also if a loss fails.
    Raises ValueError where ρ is negative or not finite.
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"sharp: rho is {rho}; expected a finite number >= 0 (0: the plain learner)")

    def sharp_meta_learner(theta, *args, **kwargs):
        result = meta_learner(theta, *args, **kwargs)
        if rho == 0:
            return result
        before = [p.detach().clone() for p in theta.values()]
        try:
            perturb(theta, rho)
            return meta_learner(theta, *args, **kwargs)
        finally:
            with torch.no_grad():
                for p, value in zip(theta.values(), before, strict=True):
                    p.copy_(value)

    return sharp_meta_learner


@torch.no_grad()
def perturb(theta, rho):
    """θ ← θ + ρ g/‖g‖ in place, g the `.grad` of theta's leaves (S, 1, ...); a run whose g is zero stays."""
    norm = flatten([p.grad for p in theta.values()]).norm(dim=2)  # (S, 1)
    scale = torch.where(norm > 0, rho / norm, 0.0)
    for p in theta.values():
        p += scale.reshape(-1, *[1] * (p.dim() - 1)) * p.grad
