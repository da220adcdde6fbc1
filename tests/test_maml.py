"""Meta-gradients against closed forms on quadratics, finite differences, and plain loops; all in float64."""

import re

import pytest
import torch

from directed import directed
from maml import (
    LEARNERS,
    adapt,
    conjugate_gradients,
    expand,
    imaml,
    learned_alpha,
    maml,
    maml_plus_plus,
    multi_step_weights,
    proximal,
    reptile,
    sharp,
)

S, M, ALPHA = 2, 3, 0.1
FUNCTIONS = [name for name, row in LEARNERS.items() if not row.sharp]  # `sharp` goes around some of these


def alpha_of(name, theta, alpha=ALPHA, inner_steps=2):
    """What a learner takes as alpha: a number, or leaves."""
    row = LEARNERS[name]
    return learned_alpha(theta, alpha, inner_steps if row.alpha_by_step else None) if row.learns_alpha else alpha


def quadratics():
    """L_si(θ) = ½ a (θ − c)² for S runs and M tasks: curvatures a, centres c (S, M), and θ (S, 1)."""
    g = torch.Generator().manual_seed(0)
    a, c, theta = (torch.rand(*shape, generator=g, dtype=torch.float64) + 0.5 for shape in ((S, M), (S, M), (S, 1)))
    return a, c, theta, lambda params: 0.5 * a * (params["x"] - c) ** 2


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("name", ["maml", "fomaml", "meta-sgd", "reptile"])
def test_updates_are_those_derived_by_hand_on_quadratics(name, inner_steps):
    a, c, x, task_loss = quadratics()
    shrink = (1 - ALPHA * a) ** inner_steps  # θ' − c = (1 − αa)ⁿ (θ − c)
    expected = {
        "maml": (a * shrink**2 * (x - c)).sum(1, keepdim=True),  # d/dθ ½a(θ' − c)²
        "fomaml": (a * shrink * (x - c)).sum(1, keepdim=True),  # d/dθ' of the same
        "reptile": x - (c + shrink * (x - c)).mean(1, keepdim=True),
    }
    theta = {"x": x.clone().requires_grad_()}
    alpha = alpha_of(name, theta)
    LEARNERS[name].function(theta, task_loss, alpha, M, inner_steps=inner_steps)
    torch.testing.assert_close(theta["x"].grad, expected["maml" if name == "meta-sgd" else name])
    if name == "meta-sgd":  # d/dα ½a(1 − αa)²ⁿ(θ − c)²
        by_alpha = -inner_steps * a**2 * (1 - ALPHA * a) ** (2 * inner_steps - 1) * (x - c) ** 2
        torch.testing.assert_close(alpha["x"].grad, by_alpha.sum(1, keepdim=True))


def regression(seed=0, dtype=torch.float64):
    """A smooth non-quadratic loss: a small tanh network per run on M tasks of fixed data; two parameters."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(S, M, 5, 2, generator=g, dtype=dtype) for _ in range(2))
    theta = {
        "w": torch.randn(S, 1, 2, 3, generator=g, dtype=dtype).requires_grad_(),
        "v": torch.randn(S, 1, 3, 2, generator=g, dtype=dtype).requires_grad_(),
    }
    return theta, lambda params: (((x @ params["w"]).tanh() @ params["v"] - y) ** 2).mean((2, 3))


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_second_order_meta_gradient_equals_central_differences(inner_steps):
    theta, task_loss = regression()

    def meta_loss():
        return task_loss(adapt(expand(theta, M), task_loss, ALPHA, inner_steps)).sum().item()

    maml(theta, task_loss, ALPHA, M, inner_steps)
    step = 1e-5
    for p in theta.values():
        numeric = torch.zeros_like(p)
        for i in range(p.numel()):
            with torch.no_grad():
                entry = p.view(-1)
                entry[i] += step
                up = meta_loss_at(meta_loss)
                entry[i] -= 2 * step
                down = meta_loss_at(meta_loss)
                entry[i] += step
            numeric.view(-1)[i] = (up - down) / (2 * step)
        torch.testing.assert_close(p.grad, numeric, rtol=1e-7, atol=1e-8)


def meta_loss_at(meta_loss):
    with torch.enable_grad():
        return meta_loss()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_runs_and_tasks_equal_a_plain_loop_over_them(name):
    theta, task_loss = regression()
    LEARNERS[name].function(theta, task_loss, alpha_of(name, theta), M, inner_steps=2)
    for s in range(S):
        run = {key: p[s : s + 1].detach().requires_grad_() for key, p in theta.items()}
        step_sizes = alpha_of(name, run)
        total = dict.fromkeys(run, 0.0)
        for i in range(M):  # one task of one run at a time

            def one_task(params, s=s, i=i):
                padded = {key: p.expand(S, M, *p.shape[2:]) for key, p in params.items()}
                return task_loss(padded)[s : s + 1, i : i + 1]

            LEARNERS[name].function(run, one_task, step_sizes, 1, inner_steps=2)
            total = {key: total[key] + p.grad for key, p in run.items()}
        for key, p in theta.items():
            expected = total[key] / (M if LEARNERS[name].averages else 1)
            torch.testing.assert_close(p.grad[s : s + 1], expected)


def alpha_by_step(steps):
    """Step sizes (S, 1, steps) of the parameter x of `quadratics`, all different."""
    return torch.linspace(0.05, 0.3, S * steps, dtype=torch.float64).reshape(S, 1, steps)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0], [0.2, 0.3, 0.5], [0.7, 0.0, 0.0], torch.tensor([0.1, 0.2, 0.7])])
def test_maml_plus_plus_is_derived_by_hand_on_quadratics(weights, second_order):
    a, c, x, task_loss = quadratics()
    steps = 3 if weights is None else len(weights)
    alpha = {"x": alpha_by_step(steps).requires_grad_()}
    theta = {"x": x.clone().requires_grad_()}
    maml_plus_plus(theta, task_loss, alpha, M, steps, second_order, weights)

    w = [0.0, 0.0, 1.0] if weights is None else [float(number) for number in weights]
    shrink = 1 - alpha["x"].detach() * a[..., None]  # (S, M, steps): θ'ⱼ − c = Π_{k≤j} (1 − αₖa) (θ − c)
    off = shrink.cumprod(2) * (x - c)[..., None]  # θ'ⱼ − c for j = 1, .., steps
    before = torch.cat([(x - c)[..., None], off[..., :-1]], 2)  # θ'ₖ₋₁ − c, where step k starts
    by_theta, by_alpha = torch.zeros_like(x), torch.zeros_like(alpha["x"])
    for j in range(steps):  # d/dθ and d/dαₖ of wⱼ ½a(θ'ⱼ − c)²
        slope = w[j] * a * off[..., j]
        by_theta += (slope * (shrink.cumprod(2)[..., j] if second_order else 1)).sum(1, keepdim=True)
        for k in range(j + 1):
            later = shrink[..., k + 1 : j + 1].prod(2) if second_order else 1  # dθ'ⱼ/dθ'ₖ
            by_alpha[..., k] -= (slope * later * a * before[..., k]).sum(1, keepdim=True)  # dθ'ₖ/dαₖ = −a(θ'ₖ₋₁ − c)
    torch.testing.assert_close(theta["x"].grad, by_theta)
    torch.testing.assert_close(alpha["x"].grad, by_alpha)


@pytest.mark.parametrize("second_order", [True, False])
def test_weight_on_the_last_step_alone_is_plain_maml_to_the_bit(second_order):
    (theta, task_loss), (expected, _) = regression(), regression()
    maml_plus_plus(theta, task_loss, ALPHA, M, 3, second_order, [0, 0, 1])
    maml(expected, task_loss, ALPHA, M, 3, second_order)
    assert all(torch.equal(p.grad, expected[key].grad) for key, p in theta.items())


@pytest.mark.parametrize("second_order", [True, False])
def test_alpha_with_equal_steps_is_meta_sgd_and_its_gradient_is_split_over_the_steps(second_order):
    theta, task_loss = regression()
    expected, _ = regression()
    by_step, shared = learned_alpha(theta, ALPHA, inner_steps=3), learned_alpha(expected, ALPHA)
    maml(theta, task_loss, by_step, M, 3, second_order)
    maml(expected, task_loss, shared, M, 3, second_order)
    for key, p in theta.items():
        assert torch.equal(p.grad, expected[key].grad)
        torch.testing.assert_close(by_step[key].grad.sum(2), shared[key].grad)
        assert (by_step[key].grad[:, :, 0] - by_step[key].grad[:, :, 2]).abs().max() > 1e-3


def test_steps_beyond_those_that_alpha_knows_take_the_last():
    a, c, x, task_loss = quadratics()
    alpha = alpha_by_step(2)
    start = expand({"x": x.clone().requires_grad_()}, M)
    adapted = adapt(start, task_loss, {"x": alpha}, inner_steps=4)["x"]
    shrink = (1 - alpha[..., 0] * a) * (1 - alpha[..., 1] * a) ** 3
    torch.testing.assert_close(adapted, c + shrink * (x - c))


def test_weighted_steps_cost_no_further_loss():
    _, c, x, _ = quadratics()
    draws = iter([1.0, 2.0, 5.0])  # curvatures of the first step, of the second, and of the query
    theta = {"x": x.clone().requires_grad_()}
    maml_plus_plus(theta, lambda p: 0.5 * next(draws) * (p["x"] - c) ** 2, ALPHA, M, 2, step_weights=[0.25, 0.75])
    assert next(draws, None) is None
    first = (1 - 1.0 * ALPHA) * (x - c)  # θ'₁ − c, on which the second step's draw is a query
    second = (1 - 2.0 * ALPHA) * first
    by_hand = 0.25 * 2.0 * first * (1 - ALPHA) + 0.75 * 5.0 * second * (1 - ALPHA) * (1 - 2 * ALPHA)
    torch.testing.assert_close(theta["x"].grad, by_hand.sum(1, keepdim=True))


@pytest.mark.parametrize("weights, inner_steps", [([1.0], 2), ([0.5, 0.5], 1), ([], 0)])
def test_step_weights_that_do_not_fit_the_inner_steps_are_refused(weights, inner_steps):
    theta, task_loss = regression()
    with pytest.raises(ValueError, match=r"maml_plus_plus: step_weights is \[.*; expected a number for each"):
        maml_plus_plus(theta, task_loss, ALPHA, M, inner_steps, step_weights=weights)


def test_multi_step_weights_go_from_equal_to_the_last_step_alone():
    assert multi_step_weights(4, 0, 10) == [0.25, 0.25, 0.25, 0.25]
    assert multi_step_weights(4, 5, 10) == [0.125, 0.125, 0.125, 0.625]
    for epoch, epochs in ((10, 10), (99, 10), (0, 0)):
        assert multi_step_weights(4, epoch, epochs) == [0, 0, 0, 1]
    assert multi_step_weights(1, 0, 10) == [1]


def test_maml_plus_plus_is_of_first_order_at_first_and_weighs_its_inner_steps_ever_less():
    """With N = 4 steps and E = 10 epochs the first three weights are (1 − epoch/E)/N each, and all sum up to 1."""
    settings = {"first_order_epochs": 5, "multi_step_epochs": 10, "inner_steps": 4}
    for epoch, second_order, early in ((0, False, 1 / 4), (4, False, 0.15), (5, True, 1 / 8)):
        expected = {"second_order": second_order, "step_weights": pytest.approx([early] * 3 + [1 - 3 * early])}
        assert LEARNERS["maml++"].each_epoch(settings, epoch) == expected
    for epoch in (10, 11):  # MAML itself, at no more work than its
        assert LEARNERS["maml++"].each_epoch(settings, epoch) == {"second_order": True, "step_weights": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_alpha_of_each_run_gives_the_bits_that_its_number_gives_alone(name, dtype):
    numbers = [0.1, 0.003]  # neither is exact in float32 or float64
    theta, task_loss = regression(dtype=dtype)
    alpha = torch.tensor(numbers, dtype=torch.float64)[:, None]  # (S, 1)
    LEARNERS[name].function(theta, task_loss, alpha_of(name, theta, alpha), M, inner_steps=2)
    for s, number in enumerate(numbers):
        expected, _ = regression(dtype=dtype)
        LEARNERS[name].function(expected, task_loss, alpha_of(name, expected, number), M, inner_steps=2)
        for key in theta:
            assert theta[key].grad.dtype == dtype and torch.equal(theta[key].grad[s], expected[key].grad[s])
    assert not torch.equal(theta["w"].grad[0], expected["w"].grad[0])  # the runs' numbers do differ


def test_learned_alpha_starts_at_the_number_of_its_run_and_is_a_leaf():
    theta, _ = regression(dtype=torch.float32)
    of_each = torch.tensor([[0.1], [0.003]], dtype=torch.float64)
    for inner_steps, axis in ((None, ()), (3, (3,))):
        for alpha, numbers in ((0.1, [0.1, 0.1]), (of_each, [0.1, 0.003])):
            for key, learned in learned_alpha(theta, alpha, inner_steps).items():
                assert learned.is_leaf and learned.requires_grad
                assert learned.shape == (S, 1, *axis, *theta[key].shape[2:])
                for s, number in enumerate(numbers):
                    assert torch.equal(learned[s], torch.full_like(learned[s], number))


@pytest.mark.parametrize("shape", [(S,), (1, S), (S + 1, 1), (S, M), (S, 1, 1)])
def test_an_alpha_for_each_run_of_another_shape_is_refused(shape):
    theta, task_loss = regression()
    with pytest.raises(ValueError, match=r"alpha is a tensor of shape \(.* for 2 runs; expected a number.*\(2, 1\)"):
        maml(theta, task_loss, torch.full(shape, ALPHA), M)
    with pytest.raises(ValueError, match="alpha is a tensor of shape"):
        learned_alpha(theta, torch.full(shape, ALPHA))


def test_task_loss_is_asked_anew_before_every_step_and_once_for_the_query():
    a, c, x, task_loss = quadratics()
    calls = []

    def counting(params):
        calls.append(params["x"].detach().clone())
        return task_loss(params)

    theta = {"x": x.clone().requires_grad_()}
    maml(theta, counting, ALPHA, M, inner_steps=2)
    assert len(calls) == 3 and not torch.equal(calls[0], calls[1]) and not torch.equal(calls[1], calls[2])
    calls.clear()
    reptile(theta, counting, ALPHA, M, inner_steps=2)  # no query batch
    assert len(calls) == 2


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("learned", [False, True])
def test_no_inner_steps_is_joint_training_with_one_loss(second_order, learned):
    a, c, x, task_loss = quadratics()
    calls = []

    def counting(params):
        calls.append(params)
        return task_loss(params)

    theta = {"x": x.clone().requires_grad_()}
    alpha = learned_alpha(theta, ALPHA) if learned else ALPHA
    assert adapt(theta, counting, alpha, inner_steps=0) is theta and not calls
    maml(theta, counting, alpha, M, inner_steps=0, second_order=second_order)
    torch.testing.assert_close(theta["x"].grad, (a * (x - c)).sum(1, keepdim=True))  # Σᵢ d/dθ ½aᵢ(θ − cᵢ)²
    assert len(calls) == 1
    if learned:
        assert torch.equal(alpha["x"].grad, torch.zeros_like(x))  # no step was taken with it


@pytest.mark.parametrize("inner_steps", [-1, 0.5])
def test_a_number_of_inner_steps_that_makes_no_sense_is_refused(inner_steps):
    theta, task_loss = regression()
    for learner in (maml, reptile):
        with pytest.raises(ValueError, match=f"inner_steps is {inner_steps}; expected a whole number >= 0"):
            learner(theta, task_loss, ALPHA, M, inner_steps=inner_steps)
    with pytest.raises(ValueError, match="reptile: inner_steps is 0"):
        reptile(theta, task_loss, ALPHA, M, inner_steps=0)


def test_parameters_that_were_not_expanded_are_refused():
    theta, task_loss = regression()
    with pytest.raises(ValueError, match=r"'w' has shape \(2, 1, 2, 3\) and the loss \(2, 3\).*expand them first"):
        adapt(theta, task_loss, ALPHA)
    one_run_less = {"v": theta["v"], "w": theta["w"][:1]}
    with pytest.raises(ValueError, match=r"'w' has shape \(1, 3, 2, 3\) and the loss \(2, 3\)"):
        maml(one_run_less, task_loss, ALPHA, M)


@pytest.mark.parametrize("leaf", [torch.ones(()), torch.ones(S), torch.ones(S, 3), torch.ones(S, M, 2, 3)])
def test_theta_without_the_axes_of_runs_and_tasks_is_refused(leaf):
    theta, task_loss = regression()
    theta["w"] = leaf.requires_grad_()
    for learner in (maml, reptile):
        with pytest.raises(ValueError, match=r"'w' has shape \(.*; expected \(S, 1, ...\)"):
            learner(theta, task_loss, ALPHA, M)


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_a_parameter_without_requires_grad_is_refused(inner_steps):
    theta, task_loss = regression()
    theta["v"] = theta["v"].detach()
    with pytest.raises(ValueError, match="'v' has requires_grad=False; expected leaves made with requires_grad_"):
        maml(theta, task_loss, ALPHA, M, inner_steps)
    theta, _ = regression()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_parameter_that_the_loss_does_not_use_is_named(name):
    theta, task_loss = regression()
    theta["spare"] = torch.zeros(S, 1, 2, requires_grad=True)
    alpha = alpha_of(name, theta)
    with pytest.raises(ValueError, match="the loss does not use parameter 'spare'; keep it out of"):
        LEARNERS[name].function(theta, task_loss, alpha, M)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("num_tasks", [0, -1])
def test_no_tasks_are_refused(name, num_tasks):
    theta, task_loss = regression()
    with pytest.raises(ValueError, match=f"num_tasks is {num_tasks}; expected a whole number >= 1"):
        LEARNERS[name].function(theta, task_loss, alpha_of(name, theta), num_tasks)


def test_a_loss_without_a_gradient_is_refused():
    theta, task_loss = regression()
    with torch.no_grad(), pytest.raises(ValueError, match="the loss has no gradient; .*outside of no_grad"):
        adapt(expand(theta, M), task_loss, ALPHA)
    with pytest.raises(ValueError, match="the loss has no gradient"):
        maml(theta, lambda params: task_loss(params).detach(), ALPHA, M, inner_steps=0)


WRONG_SHAPES = {
    "one number for all": lambda loss: loss.mean(),
    "one number a run": lambda loss: loss.sum(1),
    "one number a run, axis kept": lambda loss: loss.sum(1, keepdim=True),
    "tasks before runs": lambda loss: loss.T,
    "an axis of data left": lambda loss: loss[..., None],
}


@pytest.mark.parametrize("reduce", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_a_loss_of_another_shape_than_runs_by_tasks_is_refused_at_every_call(reduce):
    theta, task_loss = regression()
    for wrong_call in (1, 2, 3):  # two inner steps and the query
        calls = iter(range(1, 4))

        def mistaken(params, calls=calls, wrong_call=wrong_call):
            return reduce(task_loss(params)) if next(calls) == wrong_call else task_loss(params)

        with pytest.raises(ValueError, match=r"'w' has shape \(2, 3, 2, 3\) and the loss \(.*expected a loss \(S, M\)"):
            maml(theta, mistaken, ALPHA, M, inner_steps=2)
        assert next(calls, None) == (wrong_call + 1 if wrong_call < 3 else None)  # none is asked after it
        assert theta["w"].grad is None


# --- iMAML ---

LAMBDA = 2.0


def converged(a, c, x):
    """The minimum of ½a(θ' − c)² + λ/2 (θ' − θ)²: a(θ' − c) + λ(θ' − θ) = 0."""
    return (a * c + LAMBDA * x) / (a + LAMBDA)


@pytest.mark.parametrize("inner_steps", [0, 1, 3, 200])
def test_imaml_is_the_closed_form_on_quadratics(inner_steps):
    a, c, x, task_loss = quadratics()
    theta = {"x": x.clone().requires_grad_()}
    imaml(theta, task_loss, ALPHA, M, inner_steps, LAMBDA, cg_steps=1, cg_damping=0)
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
    imaml(theta, task_loss, 0.01, M, inner_steps, LAMBDA, 5, cg_damping=0)  # 5 numbers: exact after 5 steps
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
    imaml(theta, task_loss, ALPHA, M, inner_steps, LAMBDA, cg_steps=24, cg_damping=0)
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
        imaml(theta, lambda params, d=draws: 0.5 * next(d) * (params["x"] - c) ** 2, ALPHA, M, 2, LAMBDA, cg_steps, 0)
        assert next(draws, None) is None
        adapted = x - ALPHA * 1.0 * (x - c)
        adapted = adapted - ALPHA * (2.0 * (adapted - c) + LAMBDA * (adapted - x))
        torch.testing.assert_close(theta["x"].grad, (3.0 * (adapted - c) / (1 + 5.0 / LAMBDA)).sum(1, keepdim=True))


@pytest.mark.parametrize("damping", [0.0, 1.0, torch.tensor([[1.0], [3.0]], dtype=torch.float64)])
def test_damping_is_the_authors_form_and_bounds_a_task_of_any_curvature(damping):
    """x = (1 + d) ∇L / (1 + d + a/λ); where 1 + a/λ ≤ 0 the plain gradient. So x/∇L is at most (1 + d)/d."""
    share = torch.tensor([[-3.0, -1.001, -0.999, -0.5, 0.0, 2.0]], dtype=torch.float64).expand(S, 6)  # a/λ
    _, _, x, _ = quadratics()
    theta = {"x": x.clone().requires_grad_()}
    factors = torch.where(1 + share > 0, (1 + damping) / (1 + damping + share), 1.0)
    if torch.is_tensor(damping):
        assert (factors <= (1 + damping) / damping).all()
    imaml(theta, lambda params: 0.5 * LAMBDA * share * params["x"] ** 2, ALPHA, 6, 0, LAMBDA, 3, damping)
    torch.testing.assert_close(theta["x"].grad, (factors * LAMBDA * share * x).sum(1, keepdim=True))


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
    imaml(theta, lambda params: quadratic(params) + 3 * params["y"], ALPHA, M, 0, LAMBDA, 2, cg_damping=0)
    torch.testing.assert_close(theta["y"].grad, torch.full_like(x, 3.0 * M))
    torch.testing.assert_close(theta["x"].grad, (a * (x - c) / (1 + a / LAMBDA)).sum(1, keepdim=True))


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


def test_rho_zero_changes_nothing_and_costs_nothing():
    results, calls = [], []
    for learner in (maml, sharp(maml, 0.0)):
        theta, task_loss = regression()
        count = []
        learner(theta, lambda params, n=count, loss=task_loss: n.append(1) or loss(params), ALPHA, M)
        results.append([p.detach() for p in theta.values()] + [p.grad for p in theta.values()])
        calls.append(len(count))
    assert all(torch.equal(plain, with_rho) for plain, with_rho in zip(*results, strict=True))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sharp_is_the_learner_at_the_perturbed_theta_for_every_learner(name):
    learner = LEARNERS[name].function
    theta, task_loss = regression()
    moved, _ = regression()
    alpha, moved_alpha = alpha_of(name, theta), alpha_of(name, moved)
    sharp(learner, RHO)(theta, task_loss, alpha, M)
    learner(moved, task_loss, moved_alpha, M)
    norms = sum(p.grad.square().sum((1, 2, 3), keepdim=True) for p in moved.values()).sqrt()
    moved = {key: (p + RHO * p.grad / norms).detach().requires_grad_() for key, p in moved.items()}
    learner(moved, task_loss, moved_alpha, M)
    for key, p in theta.items():
        torch.testing.assert_close(p.grad, moved[key].grad, rtol=1e-10, atol=1e-12)
        if LEARNERS[name].learns_alpha:
            assert torch.equal(alpha[key], torch.full_like(alpha[key], ALPHA))  # not perturbed
            torch.testing.assert_close(alpha[key].grad, moved_alpha[key].grad, rtol=1e-10, atol=1e-12)


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


# --- the table ---


@pytest.mark.parametrize("name", LEARNERS)
def test_no_learner_waits_for_a_number_of_the_device(name):
    """On torch's device "meta" a tensor has no values: asking for one is an error, as it is in a CUDA graph."""
    row, steps = LEARNERS[name], 2
    own = {"lambda_": torch.ones(S, 1, device="meta"), "step_weights": torch.ones(steps, device="meta")}
    own["cg_damping"] = own["lambda_"]
    options = {key: x for key, x in own.items() if key in row.function.__code__.co_varnames}
    theta = {"w": torch.ones(S, 1, 4, device="meta", requires_grad=True)}
    alpha = alpha_of(name, theta, torch.ones(S, 1, device="meta"), steps)
    learner = sharp(row.function, RHO) if row.sharp else row.function

    def task_loss(params):
        return params["w"].tanh().square().sum(2)

    directed(learner, torch.ones(S, device="meta"))(theta, task_loss, task_loss, alpha, M, steps, **options)
    assert theta["w"].grad.shape == theta["w"].shape
