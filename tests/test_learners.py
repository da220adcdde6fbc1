"""iMAML against closed forms, linear solves and differentiation through its inner loop; Sharp-MAML by hand; float64."""

import re

import pytest
import torch

from directed import directed
from learners import conjugate_gradients, imaml, proximal, sharp
from maml import META_LEARNERS, adapt, expand, learned_alpha, maml
from tests.test_maml import ALPHA, M, S, quadratics, regression

LAMBDA = 2.0


def converged(a, c, x):
    """The minimum of ½a(θ' − c)² + λ/2 (θ' − θ)²: a(θ' − c) + λ(θ' − θ) = 0."""
    return (a * c + LAMBDA * x) / (a + LAMBDA)


@pytest.mark.parametrize("inner_steps", [0, 1, 3, 200])
def test_imaml_is_the_closed_form_on_quadratics(inner_steps):
    a, c, x, task_loss = quadratics()
    theta = {"x": x.clone().requires_grad_()}
    imaml(theta, task_loss, ALPHA, M, inner_steps, LAMBDA, cg_steps=1)
    # The proximal objective is a quadratic of curvature a + λ: each step shrinks the distance from its minimum.
    minimum = converged(a, c, x)
    adapted = minimum + (1 - ALPHA * (a + LAMBDA)) ** inner_steps * (x - minimum)
    torch.testing.assert_close(theta["x"].grad, (a * (adapted - c) / (1 + a / LAMBDA)).sum(1, keepdim=True))
    if inner_steps == 200:  # d/dθ ½a(θ' − c)² at the minimum, with dθ'/dθ = λ/(a + λ)
        exact = (a * (minimum - c) * LAMBDA / (a + LAMBDA)).sum(1, keepdim=True)
        torch.testing.assert_close(theta["x"].grad, exact, rtol=1e-12, atol=1e-12)


def coupled_quadratics(seed=0):
    """L = ½ (θ − c)ᵀ A (θ − c) with a positive definite A (S, M, 5, 5) that couples parameters of 2 and 3 numbers."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(S, M, 5, 5, generator=g, dtype=torch.float64)
    hessian, c = root @ root.mT, torch.randn(S, M, 5, generator=g, dtype=torch.float64)
    theta = {
        "u": torch.randn(S, 1, 2, generator=g, dtype=torch.float64).requires_grad_(),
        "v": torch.randn(S, 1, 3, 1, generator=g, dtype=torch.float64).requires_grad_(),
    }

    def task_loss(params):
        off = torch.cat([params["u"], params["v"].squeeze(3)], 2) - c
        return 0.5 * torch.einsum("smi,smij,smj->sm", off, hessian, off)

    return hessian, c, theta, task_loss


def test_imaml_solves_every_tasks_own_linear_system_over_all_parameters():
    hessian, c, theta, task_loss = coupled_quadratics()
    inner_steps, identity = 4, torch.eye(5, dtype=torch.float64)
    start = torch.cat([theta["u"], theta["v"].squeeze(3)], 2).detach().expand(S, M, 5)
    adapted = start
    for _ in range(inner_steps):
        slope = torch.einsum("smij,smj->smi", hessian, adapted - c) + LAMBDA * (adapted - start)
        adapted = adapted - 0.01 * slope
    gradient = torch.einsum("smij,smj->smi", hessian, adapted - c)
    expected = torch.linalg.solve(identity + hessian / LAMBDA, gradient).sum(1, keepdim=True)
    imaml(theta, task_loss, 0.01, M, inner_steps, LAMBDA, cg_steps=5)  # 5 numbers: exact after 5 steps
    torch.testing.assert_close(theta["u"].grad, expected[:, :, :2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(theta["v"].grad, expected[:, :, 2:, None], rtol=1e-9, atol=1e-9)


def test_imaml_equals_differentiating_through_many_inner_steps():
    theta, task_loss = regression()
    inner_steps = 400
    start = expand(theta, M)

    def proximal_with_theta_in_the_graph(params):
        return task_loss(params) + LAMBDA / 2 * sum((params[k] - start[k]).square().sum((2, 3)) for k in params)

    through = adapt(start, proximal_with_theta_in_the_graph, ALPHA, inner_steps)
    expected = torch.autograd.grad(task_loss(through).sum(), list(theta.values()))
    imaml(theta, task_loss, ALPHA, M, inner_steps, LAMBDA, cg_steps=24)
    for p, gradient in zip(theta.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-9)
    solved = theta["w"].grad
    imaml(theta, task_loss, ALPHA, M, inner_steps, LAMBDA, cg_steps=0)
    assert (theta["w"].grad - solved).abs().max() > 0.01  # the Hessian matters here


def test_imaml_asks_for_one_draw_for_the_hessian_and_the_last_for_the_query():
    _, c, x, _ = quadratics()
    curvatures = [1.0, 2.0, 5.0, 3.0]  # of the two inner steps, the Hessian and the query
    for cg_steps in (1, 4):
        draws = iter(curvatures)
        theta = {"x": x.clone().requires_grad_()}
        imaml(theta, lambda params, d=draws: 0.5 * next(d) * (params["x"] - c) ** 2, ALPHA, M, 2, LAMBDA, cg_steps)
        assert next(draws, None) is None
        adapted = x - ALPHA * 1.0 * (x - c)
        adapted = adapted - ALPHA * (2.0 * (adapted - c) + LAMBDA * (adapted - x))
        torch.testing.assert_close(theta["x"].grad, (3.0 * (adapted - c) / (1 + 5.0 / LAMBDA)).sum(1, keepdim=True))


def test_a_task_of_too_negative_curvature_takes_its_plain_gradient_and_disturbs_no_other():
    a, c, x, _ = quadratics()
    a[0, 1] = -3 * LAMBDA  # 1 + a/λ = −2
    theta = {"x": x.clone().requires_grad_()}
    imaml(theta, lambda params: 0.5 * a * (params["x"] - c) ** 2, ALPHA, M, 1, LAMBDA, cg_steps=3)
    gradient = a * (1 - ALPHA * a) * (x - c)
    solved = gradient / (1 + a / LAMBDA)
    solved[0, 1] = gradient[0, 1]
    torch.testing.assert_close(theta["x"].grad, solved.sum(1, keepdim=True))


def test_conjugate_gradients_keep_what_they_have_where_a_later_direction_is_not_convex():
    # A = diag(1, −2), b = (2, 1): bᵀAb = 2, step 5/2, x = (5, 2.5), residual (−3, 6), next direction (−3, 6) + 9b
    # = (15, 15), whose curvature is −225. The second system, A = diag(1, 4), is solved beside it.
    a = torch.tensor([[[1.0, -2.0], [1.0, 4.0]]], dtype=torch.float64)
    b = torch.tensor([[[2.0, 1.0], [2.0, 1.0]]], dtype=torch.float64)
    for steps in (2, 5):
        x = conjugate_gradients(lambda v: a * v, b, steps)
        torch.testing.assert_close(x[0, 0], torch.tensor([5.0, 2.5], dtype=torch.float64))
        torch.testing.assert_close(x[0, 1], torch.tensor([2.0, 0.25], dtype=torch.float64))


def test_imaml_at_a_minimum_is_zero_and_not_nan():
    _, _, x, _ = quadratics()
    theta = {"x": x.clone().requires_grad_()}
    imaml(theta, lambda params: (params["x"] - x).square().expand(S, M), ALPHA, M, 2, LAMBDA, cg_steps=3)
    assert torch.equal(theta["x"].grad, torch.zeros_like(x))


def test_imaml_where_the_loss_is_linear_in_one_parameter_leaves_that_gradient_as_it_is():
    a, c, x, quadratic = quadratics()
    theta = {"x": x.clone().requires_grad_(), "y": x.clone().requires_grad_()}
    imaml(theta, lambda params: quadratic(params) + 3 * params["y"], ALPHA, M, 0, LAMBDA, cg_steps=2)
    torch.testing.assert_close(theta["y"].grad, torch.full_like(x, 3.0 * M))
    torch.testing.assert_close(theta["x"].grad, (a * (x - c) / (1 + a / LAMBDA)).sum(1, keepdim=True))


def test_runs_of_imaml_never_influence_each_other():
    theta, task_loss = regression()
    imaml(theta, task_loss, ALPHA, M, 3, LAMBDA)
    for s in range(S):
        run = {key: p[s : s + 1].detach().requires_grad_() for key, p in theta.items()}
        imaml(run, lambda params, s=s: loss_of_run(task_loss, params, s), ALPHA, M, 3, LAMBDA)
        assert all(torch.equal(p.grad[s : s + 1], run[key].grad) for key, p in theta.items())
    alone = {key: p.grad[1] for key, p in theta.items()}
    with torch.no_grad():
        theta["w"][0] = torch.nan
    imaml(theta, task_loss, ALPHA, M, 3, LAMBDA)
    assert theta["w"].grad[0].isnan().all()  # not hidden
    assert all(torch.equal(p.grad[1], alone[key]) for key, p in theta.items())


def loss_of_run(task_loss, params, s):
    """task_loss of all runs, asked for run s alone: params (1, M, ...) -> (1, M)."""
    return task_loss({key: p.expand(S, *p.shape[1:]) for key, p in params.items()})[s : s + 1]


def test_an_alpha_of_each_run_works_in_imaml():
    a, c, x, task_loss = quadratics()
    alpha = torch.tensor([[0.1], [0.02]], dtype=torch.float64)
    theta = {"x": x.clone().requires_grad_()}
    imaml(theta, task_loss, alpha, M, 1, LAMBDA, cg_steps=1)
    torch.testing.assert_close(theta["x"].grad, (a * (1 - alpha * a) * (x - c) / (1 + a / LAMBDA)).sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_of_each_run_gives_the_bits_that_its_number_gives_alone(dtype):
    numbers = [2.1, 0.7]  # neither is exact in float32 or float64
    theta, task_loss = regression(dtype=dtype)
    lambda_ = torch.tensor(numbers, dtype=torch.float64)[:, None]  # (S, 1)
    imaml(theta, task_loss, ALPHA, M, inner_steps=2, lambda_=lambda_)
    for s, number in enumerate(numbers):
        expected, _ = regression(dtype=dtype)
        imaml(expected, task_loss, ALPHA, M, inner_steps=2, lambda_=number)
        for key in theta:
            assert theta[key].grad.dtype == dtype and torch.equal(theta[key].grad[s], expected[key].grad[s])
    assert not torch.equal(theta["w"].grad[0], expected["w"].grad[0])  # the runs' numbers do differ


def test_imaml_without_steps_of_either_kind_is_joint_training():
    theta, task_loss = regression()
    imaml(theta, task_loss, ALPHA, M, inner_steps=0, cg_steps=0)
    joint, _ = regression()
    maml(joint, task_loss, ALPHA, M, inner_steps=0)
    for key in theta:
        torch.testing.assert_close(theta[key].grad, joint[key].grad)


def test_mistaken_calls_of_imaml_are_refused():
    theta, task_loss = regression()
    for lambda_ in (0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 2.0])):
        shown = re.escape(str(lambda_.tolist() if torch.is_tensor(lambda_) else lambda_))
        with pytest.raises(ValueError, match=f"proximal: lambda_ is {shown}; expected a finite number > 0"):
            imaml(theta, task_loss, ALPHA, M, lambda_=lambda_)
    with pytest.raises(ValueError, match="imaml: cg_steps is -1; expected a whole number >= 0"):
        imaml(theta, task_loss, ALPHA, M, cg_steps=-1)
    with pytest.raises(ValueError, match=r"the loss \(2, 1\); expected a loss \(S, M\)"):
        imaml(theta, lambda params: task_loss(params).sum(1, keepdim=True), ALPHA, M)
    start = expand(theta, M)
    with pytest.raises(ValueError, match=r"the loss \(2,\); expected a loss \(S, M\)"):
        adapt(start, proximal(lambda params: task_loss(params).sum(1), start, LAMBDA), ALPHA)


RHO = 0.3


def two_parameters():
    """L = ½ a (x − c)² + ½ b ‖y‖² with x (S, 1) and y (S, 1, 2): θ, the loss, and MAML's meta-gradient by hand."""
    a, c, x, quadratic = quadratics()
    b = a.flip(1) + 0.2
    y = torch.stack([x, -2 * x], 2)

    def task_loss(params):
        return quadratic(params) + 0.5 * b * params["y"].square().sum(2)

    def meta_gradient(x, y):  # one inner step shrinks x − c by 1 − αa and y by 1 − αb
        by_x = (a * (1 - ALPHA * a) ** 2 * (x - c)).sum(1, keepdim=True)
        by_y = ((b * (1 - ALPHA * b) ** 2).sum(1, keepdim=True))[..., None] * y
        return by_x, by_y

    return {"x": x.clone().requires_grad_(), "y": y.clone().requires_grad_()}, task_loss, meta_gradient


def ascended(x, y, meta_gradient, rho=RHO):
    """θ + ρ g/‖g‖, one norm for each run, over the three numbers of x and y."""
    by_x, by_y = meta_gradient(x, y)
    norm = (by_x**2 + (by_y**2).sum(2)).sqrt()
    return x + rho * by_x / norm, y + rho * by_y / norm[..., None]


def test_sharp_maml_is_derived_by_hand_on_quadratics():
    theta, task_loss, meta_gradient = two_parameters()
    before = {key: p.detach().clone() for key, p in theta.items()}
    sharp(maml, RHO)(theta, task_loss, ALPHA, M)
    by_x, by_y = meta_gradient(*ascended(before["x"], before["y"], meta_gradient))
    torch.testing.assert_close(theta["x"].grad, by_x)
    torch.testing.assert_close(theta["y"].grad, by_y)
    assert all(torch.equal(p, before[key]) and p.is_leaf for key, p in theta.items())


def test_the_delta_step_comes_before_both_gradients_of_sharp_maml():
    theta, task_loss, meta_gradient = two_parameters()
    x, y = ((1 - 0.05) * p.detach() for p in theta.values())  # θ − δθ, of the medium loss ½‖θ‖²

    def medium_loss(params):
        return 0.5 * (params["x"].square() + params["y"].square().sum(2))

    directed(sharp(maml, RHO), 0.05)(theta, medium_loss, task_loss, ALPHA, M)
    by_x, by_y = meta_gradient(*ascended(x, y, meta_gradient))
    torch.testing.assert_close(theta["x"].grad, by_x)
    torch.testing.assert_close(theta["y"].grad, by_y)
    torch.testing.assert_close(theta["x"].detach(), x)
    torch.testing.assert_close(theta["y"].detach(), y)


@pytest.mark.parametrize("name", META_LEARNERS)
def test_rho_zero_changes_nothing_and_costs_nothing(name):
    results, calls = [], []
    for learner in (META_LEARNERS[name], sharp(META_LEARNERS[name], 0.0)):
        theta, task_loss = regression()
        alpha = learned_alpha(theta, ALPHA) if name == "meta-sgd" else ALPHA
        count = []
        learner(theta, lambda params, n=count, loss=task_loss: n.append(1) or loss(params), alpha, M)
        learned = [*theta.values(), *(alpha.values() if name == "meta-sgd" else ())]
        results.append([p.detach() for p in learned] + [p.grad for p in learned])
        calls.append(len(count))
    assert all(torch.equal(plain, with_rho) for plain, with_rho in zip(*results, strict=True))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["fomaml", "meta-sgd", "reptile", "imaml"])
def test_sharp_is_the_learner_at_the_perturbed_theta_for_every_learner(name):
    learner = {**META_LEARNERS, "imaml": imaml}[name]
    theta, task_loss = regression()
    moved, _ = regression()
    alpha, moved_alpha = (learned_alpha(t, ALPHA) if name == "meta-sgd" else ALPHA for t in (theta, moved))
    sharp(learner, RHO)(theta, task_loss, alpha, M)
    learner(moved, task_loss, moved_alpha, M)
    norms = sum(p.grad.square().sum((1, 2, 3), keepdim=True) for p in moved.values()).sqrt()
    moved = {key: (p + RHO * p.grad / norms).detach().requires_grad_() for key, p in moved.items()}
    learner(moved, task_loss, moved_alpha, M)
    for key, p in theta.items():
        torch.testing.assert_close(p.grad, moved[key].grad, rtol=1e-10, atol=1e-12)
        if name == "meta-sgd":
            assert torch.equal(alpha[key], torch.full_like(alpha[key], ALPHA))  # not perturbed
            torch.testing.assert_close(alpha[key].grad, moved_alpha[key].grad, rtol=1e-10, atol=1e-12)


def test_runs_of_sharp_maml_never_influence_each_other():
    theta, task_loss = regression()
    sharp(maml, RHO)(theta, task_loss, ALPHA, M)
    for s in range(S):
        run = {key: p[s : s + 1].detach().requires_grad_() for key, p in theta.items()}
        sharp(maml, RHO)(run, lambda params, s=s: loss_of_run(task_loss, params, s), ALPHA, M)
        assert all(torch.equal(p.grad[s : s + 1], run[key].grad) for key, p in theta.items())


def test_a_run_whose_meta_gradient_is_zero_is_not_perturbed():
    _, _, x, _ = quadratics()
    goal = torch.tensor([[0.0], [1.0]], dtype=torch.float64) + x  # the first run is at its minimum
    theta = {"x": x.clone().requires_grad_()}
    sharp(maml, RHO)(theta, lambda params: 0.5 * (params["x"] - goal).square().expand(S, M), ALPHA, M)
    expected = M * (1 - ALPHA) ** 2 * torch.tensor([[0.0], [-1.0 - RHO]], dtype=torch.float64)  # away from the goal
    torch.testing.assert_close(theta["x"].grad, expected)


def test_theta_is_restored_where_the_second_meta_gradient_fails():
    theta, task_loss = regression()
    before = {key: p.detach().clone() for key, p in theta.items()}
    calls = []

    def failing(params):
        calls.append(params)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return task_loss(params)

    with pytest.raises(KeyboardInterrupt):
        sharp(maml, RHO)(theta, failing, ALPHA, M)
    assert all(torch.equal(p, before[key]) for key, p in theta.items())


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_rho_that_makes_no_sense_is_refused(rho):
    with pytest.raises(ValueError, match=f"sharp: rho is {rho}; expected a finite number >= 0"):
        sharp(maml, rho)
