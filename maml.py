"""Gradient-based meta-learners on any loss: MAML, FOMAML, Meta-SGD, Reptile, MAML++, iMAML, Sharp-MAML.

Needs torch alone; copy this file into your project. Everything is batched: parameters are a dict of
tensors that start with (S, 1), S independent runs (seeds, hyper-parameters, or just 1), and M tasks
adapt at once, without a loop.

The one abstraction: `task_loss(params) -> (S, M)` draws fresh data for its M tasks *under the given
parameters* (each (S, M, ...)) and returns a differentiable loss L = −J. It is called anew before
every gradient step.

A meta-learner fills `.grad` of the parameters with its meta-gradient, and any torch optimiser takes
the step:

    theta = {name: torch.stack([...])[:, None].requires_grad_() for ...}  # leaves (S, 1, ...)
    optimizer = torch.optim.SGD(theta.values(), lr=beta)
    for epoch in range(epochs):
        maml(theta, task_loss, alpha, num_tasks)
        optimizer.step()
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha)  # to new tasks, with their loss

Losses are summed over runs and tasks, never averaged, so runs do not touch each other; the gradient
of the expanded view sums over tasks by itself, which is the sum of Eq. 2b. Equations: Zhang, Yan,
Liu 2025 (arXiv 2510.00212). All learners stand in the table `LEARNERS` at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# --- the inner loop ---


def expand(theta, num_tasks):
    """θ (S, 1, ...) seen once per task: (S, M, ...), a view whose gradients sum over the tasks.

    Raises ValueError where a parameter has no axes (S, 1) in front, and for less than one task.
    """
    if num_tasks < 1:
        raise ValueError(f"expand: num_tasks is {num_tasks}; expected a whole number >= 1")
    for name, p in theta.items():
        if p.dim() < 2 or p.shape[1] != 1:
            raise ValueError(
                f"expand: parameter {name!r} has shape {tuple(p.shape)}; expected (S, 1, ...), S runs: "
                "stack their parameters and add the axis of the tasks, torch.stack([...])[:, None], "
                "or p[None, None] for one run"
            )
    return {name: p.expand(-1, num_tasks, *p.shape[2:]) for name, p in theta.items()}


def adapt(theta, task_loss, alpha, inner_steps=1, second_order=True):
    """The inner loop for every task at once: θ'ᵢ = θ − α ∇L_Tᵢ(θ)  (Eq. 2a; L = −J).

    theta: dict of tensors (S, M, ...), from `expand`; task_loss: params -> losses (S, M).
    alpha: a number; a tensor (S, 1), one for each run; or a dict of tensors that broadcast against
    theta's (Meta-SGD), or have an axis of inner steps after the first two, (S, 1, steps, ...)
    (MAML++); later steps take the last one's.
    inner_steps: 0 or more, each on data that task_loss draws anew; 0 returns theta itself.
    second_order: keep the steps in the graph, so that a gradient through θ' sees ∇²L; False
    detaches them (FOMAML).
    Returns θ' (S, M, ...). Raises ValueError where tasks would mix (see `loss_per_task`), or alpha
    or inner_steps is none of these.
    """
    if inner_steps < 0 or inner_steps != int(inner_steps):
        raise ValueError(f"adapt: inner_steps is {inner_steps}; expected a whole number >= 0 (0: no adaptation)")
    adapted = theta
    for step in range(int(inner_steps)):
        adapted = inner_step(adapted, loss_per_task(task_loss, adapted), alpha, step, second_order)
    return adapted


def inner_step(params, loss, alpha, step, second_order, keep_graph=False):
    """θ' = θ − α ∇L(θ), of losses (S, M) in params θ. keep_graph: they are differentiated again."""
    retain = second_order or keep_graph
    gradient = gradient_of(loss, params, retain_graph=retain, create_graph=second_order)
    return {name: p - step_size(alpha, name, p, step) * gradient[name] for name, p in params.items()}


def gradient_of(loss, params, **graph):
    """∇L of losses (S, M), a dict like params. Raises ValueError where L does not use one of them."""
    gradients = torch.autograd.grad(loss.sum(), [*params.values()], allow_unused=True, **graph)
    gradient = dict(zip(params, gradients, strict=True))
    for name in params:
        if gradient[name] is None:
            raise ValueError(f"the loss does not use parameter {name!r}; keep it out of theta")
    return gradient


def loss_per_task(task_loss, params):
    """task_loss(params), (S, M), of parameters (S, M, ...).

    Raises ValueError where a parameter or the loss has no gradient, or where a parameter does not
    start with the loss's shape: tasks would mix.
    """
    loss = task_loss(params)
    for name, p in params.items():
        if not p.requires_grad:
            expected = "leaves made with requires_grad_(): keep frozen parameters out of theta"
            raise ValueError(f"parameter {name!r} has requires_grad=False; expected {expected}")
        if loss.dim() != 2 or p.shape[:2] != loss.shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(p.shape)} and the loss {tuple(loss.shape)}; "
                "expected a loss (S, M), one number a task, and parameters (S, M, ...): expand them "
                "first with expand(theta, num_tasks)"
            )
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient; expected one computed from the parameters, outside of no_grad()")
    return loss


def step_size(alpha, name, p, step=0):
    """What multiplies the gradient of the parameter p (S, M, ...): alpha in a shape that fits it."""
    if isinstance(alpha, dict):
        own = alpha[name]
        by_step = own.dim() == p.dim() + 1
        return own[:, :, min(step, own.shape[2] - 1)] if by_step else own
    runs = p.shape[0]
    if isinstance(alpha, torch.Tensor) and alpha.shape not in ((), (runs, 1)):
        raise ValueError(
            f"alpha is a tensor of shape {tuple(alpha.shape)} for {runs} runs; expected a number, a "
            f"tensor ({runs}, 1), one for each run, e.g. torch.tensor([0.001, 0.01])[:, None], or a "
            "dict of tensors"
        )
    return of_each_run(alpha, p)


def of_each_run(value, like):
    """A number, or a tensor (S, 1), in the shape that multiplies `like` (S, M, ...)."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    return value.to(like).reshape(-1, *[1] * (like.dim() - 1))  # (S, 1, ...)


def learned_alpha(theta, alpha, inner_steps=None):
    """Learned step sizes, one for each parameter, all equal to `alpha` at first: a number or (S, 1).

    Leaves (S, 1, ...) for all inner steps alike: Meta-SGD; or for each of `inner_steps`,
    (S, 1, steps, ...): MAML++.
    """
    learned = {name: torch.ones_like(p) * step_size(alpha, name, p) for name, p in theta.items()}
    if inner_steps is not None:
        learned = {name: torch.stack([p] * inner_steps, 2) for name, p in learned.items()}
    return {name: p.requires_grad_() for name, p in learned.items()}


# --- the meta-learners: (theta, task_loss, alpha, num_tasks, ...) fill `.grad` of theta ---


def maml(theta, task_loss, alpha, num_tasks, inner_steps=1, second_order=True):
    """The meta-gradient Σᵢ ∇_θ L_Tᵢ(θ'ᵢ)  (Eq. 2b), on data resampled under θ'ᵢ.

    theta: dict of leaves (S, 1, ...). second_order=False takes ∇_θ' instead of ∇_θ: FOMAML.
    alpha: as in `adapt`; a dict of leaves gets its meta-gradient too: Meta-SGD (Li et al. 2017).
    inner_steps=0 is joint training, Σᵢ ∇L_Tᵢ(θ): no adaptation, and task_loss is called once.
    Raises ValueError as `adapt` does.
    """
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha, inner_steps, second_order)
    fill_gradients(loss_per_task(task_loss, adapted), theta, alpha)


def fill_gradients(loss, theta, alpha):
    """The gradient of losses (S, M), summed, to `.grad` of theta, and of alpha where it is learned."""
    learned = [*theta.values(), *(alpha.values() if isinstance(alpha, dict) else ())]
    gradients = torch.autograd.grad(loss.sum(), learned, materialize_grads=True)
    for p, gradient in zip(learned, gradients, strict=True):
        p.grad = gradient


def fomaml(theta, task_loss, alpha, num_tasks, inner_steps=1):
    """MAML without its second-order terms, Σᵢ ∇_θ' L_Tᵢ(θ'ᵢ)  (Nichol et al. 2018)."""
    maml(theta, task_loss, alpha, num_tasks, inner_steps, second_order=False)


def reptile(theta, task_loss, alpha, num_tasks, inner_steps=5):
    """The Reptile direction θ − meanᵢ θ'ᵢ (Nichol et al. 2018), without a query batch.

    An SGD step of size ε then is θ ← θ + ε meanᵢ(θ'ᵢ − θ). Returns θ' (S, M, ...), on which it takes
    no loss, detached. Raises ValueError for inner_steps=0: θ would not move.
    """
    if inner_steps == 0:
        raise ValueError("reptile: inner_steps is 0, and it moves by inner steps alone; use maml for joint training")
    adapted = adapt(expand(theta, num_tasks), task_loss, alpha, inner_steps, second_order=False)
    for name, p in theta.items():
        p.grad = (p - adapted[name].mean(dim=1, keepdim=True)).detach()
    return {name: p.detach() for name, p in adapted.items()}


def maml_plus_plus(theta, task_loss, alpha, num_tasks, inner_steps=2, second_order=True, step_weights=None):
    """Σᵢ Σⱼ wⱼ ∇_θ L_Tᵢ(θ'ᵢⱼ), θ'ᵢⱼ after j = 1, .., N inner steps: MAML++ (Antoniou et al. 2019).

    step_weights: w, N numbers or a tensor (N,); None: the last alone, which is MAML.
    There each j has a query set. Here the loss that step j + 1 descends is the one at θ'ᵢⱼ: it is on
    data drawn anew under θ'ᵢⱼ, so no more data is needed. (A task_loss that gives all steps one
    support set would train on that set.)
    alpha: as in `maml`; `learned_alpha` with inner_steps makes MAML++'s.
    Raises ValueError as `adapt` does, and where step_weights is not one number for each inner step.
    """
    if step_weights is None:
        return maml(theta, task_loss, alpha, num_tasks, inner_steps, second_order)
    if inner_steps == 0 or len(step_weights) != inner_steps:
        raise ValueError(
            f"maml_plus_plus: step_weights is {step_weights} for {inner_steps} inner steps; expected "
            "a number for each, and one step at least"
        )
    losses, adapted = [], expand(theta, num_tasks)
    for step in range(inner_steps):
        losses.append(loss_per_task(task_loss, adapted))
        adapted = inner_step(adapted, losses[-1], alpha, step, second_order, keep_graph=True)
    losses.append(loss_per_task(task_loss, adapted))  # after 0, 1, .., N steps, (S, M) each
    weighted = sum(w * loss for w, loss in zip(step_weights, losses[1:], strict=True))
    fill_gradients(weighted, theta, alpha)


def multi_step_weights(inner_steps, epoch, epochs):
    """MAML++'s w: all 1/N in epoch 0; the last grows linearly and is alone from epoch `epochs` on."""
    early = max(0, epochs - epoch) / max(epochs, 1) / inner_steps
    return [early] * (inner_steps - 1) + [1 - (inner_steps - 1) * early]


def imaml(theta, task_loss, alpha, num_tasks, inner_steps=5, lambda_=1.0, cg_steps=5, cg_damping=1.0):
    """The implicit meta-gradient Σᵢ (I + ∇²L_Tᵢ(θ'ᵢ)/λ)⁻¹ ∇L_Tᵢ(θ'ᵢ)  (Rajeswaran et al. 2019, Lemma 1).

    θ'ᵢ: `inner_steps` plain steps on the `proximal` objective, at whose minimum this is exact,
    whatever the path to it; so memory does not grow with them. Needs α < 2/(λ + the largest curvature).
    theta: dict of leaves (S, 1, ...); alpha as in `adapt`, never learned; lambda_ as in `proximal`.
    task_loss is called `inner_steps` + 2 times: for the Hessian once, and for the query last.
    cg_steps: of conjugate gradients, a Hessian-vector product each; 0 takes ∇L(θ'ᵢ) alone.
    cg_damping: d ≥ 0, a number or (S, 1), divides the Hessian by (1 + d) λ instead of λ. Its authors'
    code solves ((1 + d) I + ∇²L/λ) x = ∇L; this is that x times 1 + d, so β means the same for all d.
    Raises ValueError as `adapt` and `proximal` do, and where cg_steps is negative.
    """
    if cg_steps < 0:
        raise ValueError(f"imaml: cg_steps is {cg_steps}; expected a whole number >= 0 (0: no Hessian)")
    start = expand(theta, num_tasks)
    objective = proximal(task_loss, start, lambda_)
    adapted = adapt(start, objective, alpha, inner_steps, second_order=False)
    adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    hessian = hessian_of(loss_per_task(task_loss, adapted), adapted)
    gradient = flatten(gradient_of(loss_per_task(task_loss, adapted), adapted).values())  # (S, M, N)
    damping = of_each_run(cg_damping, gradient)  # a number, or (S, 1, 1)
    strength = (1 + damping) * of_each_run(lambda_, gradient)
    bound = damping / (1 + damping)  # where I + ∇²L/λ has no curvature
    solution = conjugate_gradients(lambda v: v + hessian(v) / strength, gradient, cg_steps, bound)
    sizes = [p[0, 0].numel() for p in theta.values()]
    parts = solution.sum(1, keepdim=True).split(sizes, 2)  # (S, 1, n) of each parameter
    for p, part in zip(theta.values(), parts, strict=True):
        p.grad = part.reshape(p.shape)


def proximal(task_loss, theta, lambda_):
    """iMAML's inner objective L_Tᵢ(θ') + λ/2 ‖θ' − θ‖²  (Rajeswaran et al. 2019, Eq. 4), a task_loss.

    theta: dict of tensors (S, 1, ...) or (S, M, ...), held constant; so new tasks are adapted to as in
    training by adapt(start, proximal(task_loss, start, lambda_), alpha, inner_steps) with
    start = expand(theta, num_tasks).
    lambda_: λ > 0, a number, or a tensor (S, 1), one for each run.
    Raises ValueError where λ is none of these; of a GPU's tensor the shape alone is looked at.
    """
    runs, given = len(next(iter(theta.values()))), torch.as_tensor(lambda_, dtype=torch.float64)
    on_gpu = given.device.type != "cpu"  # to look at its values the host would have to wait
    in_range = on_gpu or ((given > 0) & given.isfinite()).all()
    if given.shape not in ((), (runs, 1)) or not in_range:
        raise ValueError(
            f"proximal: lambda_ is {given.tolist()}; expected a finite number > 0 (large: θ' stays "
            f"near θ), or a tensor ({runs}, 1), one for each run"
        )
    anchor = {name: p.detach() for name, p in theta.items()}

    def proximal_loss(params):
        distance = flatten([p - anchor[name] for name, p in params.items()])
        loss = loss_per_task(task_loss, params)
        return loss + of_each_run(lambda_, loss) / 2 * distance.square().sum(2)

    return proximal_loss


def flatten(tensors):
    """The N numbers of all parameters of each task in a row: tensors (S, M, ...) -> (S, M, N)."""
    return torch.cat([t.reshape(*t.shape[:2], -1) for t in tensors], 2)


def hessian_of(loss, params):
    """The function v -> ∇²L v, both (S, M, N), of losses (S, M) in params: the gradient of ∇L · v."""
    gradient = flatten(gradient_of(loss, params, create_graph=True).values())
    options = {"inputs": [*params.values()], "retain_graph": True, "materialize_grads": True}
    return lambda v: flatten(torch.autograd.grad(gradient, grad_outputs=v, **options))


def conjugate_gradients(product, b, steps, bound=0.0):
    """x ≈ A⁻¹b by conjugate gradients (Hestenes, Stiefel 1952), for every run and task at once.

    product: v (S, M, N) -> Av, A symmetric, one for each run and task; b: (S, M, N).
    A task stops where vᵀAv ≤ bound ‖v‖² along its direction v: its Hessian is indefinite and λ too
    small. It keeps the x it has, or b if that was the first direction. So no step is longer than
    what is left of b, divided by the bound.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = (residual * residual).sum(2, keepdim=True)  # (S, M, 1)
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(2, keepdim=True)
        convex = curvature > bound * (direction * direction).sum(2, keepdim=True)
        step = torch.where(convex, squared / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * image
        previous, squared = squared, (residual * residual).sum(2, keepdim=True)
        conjugate = residual + squared / previous * direction
        direction = torch.where(convex, conjugate, 0.0)  # 0 has no curvature: it stays 0
    return torch.where((x != 0).any(2, keepdim=True), x, b)


def sharp(meta_learner, rho):
    """The meta-gradient g at θ + ρ g(θ)/‖g(θ)‖ instead of at θ: Sharp-MAML_up (Abbas et al. 2022).

    meta_learner: any of those above. It is called twice, each time on data that task_loss draws
    anew; with ρ = 0 once.
    rho: radius ρ ≥ 0; the norm is over all parameters of a run, each run has its own. A learned
    alpha is not perturbed.
    Returns a function of the same arguments, after which theta is what it was, to the bit, also if a
    loss fails. Raises ValueError where ρ is negative or not finite.
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
    """θ ← θ + ρ g/‖g‖ in place, g the `.grad` of leaves (S, 1, ...); a run whose g is 0 stays."""
    norm = flatten([p.grad for p in theta.values()]).norm(dim=2)  # (S, 1)
    scale = torch.where(norm > 0, rho / norm, 0.0)
    for p in theta.values():
        p += of_each_run(scale, p) * p.grad


# --- the table: a new meta-learner is a function and a row ---


@dataclass(frozen=True)
class Learner:
    """All that run.py, its flags, evaluation and the loaded policies need to know of a meta-learner."""

    function: Callable  # (theta, task_loss, alpha, num_tasks, inner_steps=.., its own settings)
    settings: tuple = ()  # names of its own settings: its function's arguments; floats as (S, 1)
    each_epoch: Callable | None = None  # (all settings, epoch) -> those arguments in that epoch:
    #     lists of numbers, which become tensors, and switches
    defaults: dict = field(default_factory=dict)  # {setting: its own default}
    learns_alpha: bool = False  # alpha is `learned_alpha`, a step size for each parameter,
    alpha_by_step: bool = False  # and for each inner step
    second_order: bool = True  # its meta-gradient has second-order terms
    proximal: bool = False  # it adapts, later too, on the `proximal` objective with its lambda_
    sharp: bool = False  # with `sharp` around it, with the setting rho
    losses_after: int = 1  # how many losses it takes at θ', the query's last
    averages: bool = False  # its `.grad` is a mean over the tasks, not a sum
    joint_training: bool = True  # it learns without inner steps, or with alpha = 0, too


def maml_plus_plus_epoch(settings, epoch):
    """First order in the first epochs; the weights of the inner steps until the last is alone."""
    inner_steps, epochs = settings["inner_steps"], settings["multi_step_epochs"] or 0
    weights = multi_step_weights(inner_steps, epoch, epochs) if epoch < epochs else None
    return {"second_order": epoch >= settings["first_order_epochs"], "step_weights": weights}


# fmt: off
LEARNERS = {
    "maml": Learner(maml),
    "fomaml": Learner(fomaml, second_order=False),
    "meta-sgd": Learner(maml, learns_alpha=True, joint_training=False),
    # Paper: β for every learner. Here: ε = 1 for Reptile, since ε = 0.001 moves θ by 1e-6 ∇; its 5
    # steps of α add up to M·β.
    "reptile": Learner(
        reptile, defaults={"beta": 1.0, "inner_steps": 5}, second_order=False, losses_after=0, averages=True,
        joint_training=False,
    ),
    "maml++": Learner(  # it is about several inner steps: with one it is Meta-SGD
        maml_plus_plus, ("first_order_epochs", "multi_step_epochs"), maml_plus_plus_epoch, {"inner_steps": 2},
        learns_alpha=True, alpha_by_step=True, joint_training=False,
    ),
    "imaml": Learner(imaml, ("lambda_", "cg_steps", "cg_damping"), proximal=True, losses_after=2, joint_training=False),
    "sharp-maml": Learner(maml, sharp=True),
    "sharp-fomaml": Learner(fomaml, sharp=True, second_order=False),
}
# fmt: on
