"""Meta-gradients against closed forms on quadratics, finite differences, and plain loops; all in float64."""

import math

import pytest
import torch

from maml import META_LEARNERS, adapt, expand, learned_alpha, maml, multi_step_weights, reptile

S, M, ALPHA = 2, 3, 0.1


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
    alpha = learned_alpha(theta, ALPHA) if name == "meta-sgd" else ALPHA
    META_LEARNERS[name](theta, task_loss, alpha, M, inner_steps=inner_steps)
    torch.testing.assert_close(theta["x"].grad, expected["maml" if name == "meta-sgd" else name])
    if name == "meta-sgd":  # d/dα ½a(1 − αa)²ⁿ(θ − c)²
        by_alpha = -inner_steps * a**2 * (1 - ALPHA * a) ** (2 * inner_steps - 1) * (x - c) ** 2
        torch.testing.assert_close(alpha["x"].grad, by_alpha.sum(1, keepdim=True))


def test_sgd_with_beta_is_equation_2b_and_reptile_interpolates():
    a, c, x, task_loss = quadratics()
    for learner, beta in ((maml, 0.01), (reptile, 0.5)):
        theta = {"x": x.clone().requires_grad_()}
        optimizer = torch.optim.SGD(theta.values(), lr=beta)
        learner(theta, task_loss, ALPHA, M, inner_steps=1)
        optimizer.step()
        moved = c + (1 - ALPHA * a) * (x - c)
        if learner is maml:
            expected = x - beta * (a * (1 - ALPHA * a) ** 2 * (x - c)).sum(1, keepdim=True)
        else:
            expected = x + beta * (moved - x).mean(1, keepdim=True)
        torch.testing.assert_close(theta["x"].detach(), expected)


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


def test_first_order_differs_from_second_order_on_a_curved_loss():
    theta, task_loss = regression()
    grads = {}
    for name in ("maml", "fomaml"):
        META_LEARNERS[name](theta, task_loss, ALPHA, M)
        grads[name] = theta["w"].grad
    assert (grads["maml"] - grads["fomaml"]).abs().max() > 0.01


@pytest.mark.parametrize("name", META_LEARNERS)
def test_batched_runs_and_tasks_equal_a_plain_loop_over_them(name):
    theta, task_loss = regression()
    alpha = learned_alpha(theta, ALPHA) if name == "meta-sgd" else ALPHA
    META_LEARNERS[name](theta, task_loss, alpha, M, inner_steps=2)
    for s in range(S):
        run = {key: p[s : s + 1].detach().requires_grad_() for key, p in theta.items()}
        step_sizes = learned_alpha(run, ALPHA) if name == "meta-sgd" else ALPHA
        total = dict.fromkeys(run, 0.0)
        for i in range(M):  # one task of one run at a time

            def one_task(params, s=s, i=i):
                padded = {key: p.expand(S, M, *p.shape[2:]) for key, p in params.items()}
                return task_loss(padded)[s : s + 1, i : i + 1]

            META_LEARNERS[name](run, one_task, step_sizes, 1, inner_steps=2)
            total = {key: total[key] + p.grad for key, p in run.items()}
        for key, p in theta.items():
            expected = total[key] / (M if name == "reptile" else 1)
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
    maml(theta, task_loss, alpha, M, steps, second_order, weights)

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
def test_weight_on_the_last_step_alone_is_plain_maml_to_the_bit_and_no_more_work(second_order):
    results = []
    for weights in ([0, 0, 1], None):
        theta, task_loss = regression()
        backward = []  # one entry for each time that a loss is differentiated

        def watched(params, task_loss=task_loss, backward=backward):
            loss = task_loss(params)
            loss.register_hook(lambda gradient: backward.append(1))
            return loss

        maml(theta, watched, ALPHA, M, 3, second_order, weights)
        results.append((theta["w"].grad, theta["v"].grad, torch.tensor(len(backward))))
    assert all(torch.equal(weighted, plain) for weighted, plain in zip(*results, strict=True))


@pytest.mark.parametrize("second_order", [True, False])
def test_alpha_with_equal_steps_is_meta_sgd_and_its_gradient_is_split_over_the_steps(second_order):
    theta, task_loss = regression()
    expected, _ = regression()
    by_step, shared = learned_alpha(theta, ALPHA, inner_steps=3), learned_alpha(expected, ALPHA)
    maml(theta, task_loss, by_step, M, 3, second_order)
    maml(expected, task_loss, shared, M, 3, second_order)
    for key, p in theta.items():
        assert by_step[key].is_leaf and by_step[key].shape == (S, 1, 3, *p.shape[2:])
        assert torch.equal(p.grad, expected[key].grad)
        torch.testing.assert_close(by_step[key].grad.sum(2), shared[key].grad)
        assert (by_step[key].grad[:, :, 0] - by_step[key].grad[:, :, 2]).abs().max() > 1e-3


def test_learned_alpha_by_step_starts_at_the_number_of_its_run():
    theta, _ = regression()
    numbers = torch.tensor([[0.1], [0.003]], dtype=torch.float64)
    for p in learned_alpha(theta, numbers, inner_steps=2).values():
        assert p.requires_grad and torch.equal(p.detach(), numbers.reshape(S, 1, 1, 1, 1).expand_as(p))


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
    maml(theta, lambda p: 0.5 * next(draws) * (p["x"] - c) ** 2, ALPHA, M, 2, step_weights=[0.25, 0.75])
    assert next(draws, None) is None
    first = (1 - 1.0 * ALPHA) * (x - c)  # θ'₁ − c, on which the second step's draw is a query
    second = (1 - 2.0 * ALPHA) * first
    by_hand = 0.25 * 2.0 * first * (1 - ALPHA) + 0.75 * 5.0 * second * (1 - ALPHA) * (1 - 2 * ALPHA)
    torch.testing.assert_close(theta["x"].grad, by_hand.sum(1, keepdim=True))


@pytest.mark.parametrize("weights, inner_steps", [([1.0], 2), ([0.5, 0.5], 1), ([0.0, 0.0], 2), ([], 0)])
def test_step_weights_that_do_not_fit_the_inner_steps_are_refused(weights, inner_steps):
    theta, task_loss = regression()
    with pytest.raises(ValueError, match=r"maml: step_weights is \[.*; expected a number for each, not all 0"):
        maml(theta, task_loss, ALPHA, M, inner_steps, step_weights=weights)


def test_multi_step_weights_go_from_equal_to_the_last_step_alone():
    assert multi_step_weights(4, 0, 10) == [0.25, 0.25, 0.25, 0.25]
    assert multi_step_weights(4, 5, 10) == [0.125, 0.125, 0.125, 0.625]
    for epoch, epochs in ((10, 10), (99, 10), (0, 0)):
        assert multi_step_weights(4, epoch, epochs) == [0, 0, 0, 1]
    assert multi_step_weights(1, 0, 10) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", META_LEARNERS)
def test_alpha_of_each_run_gives_the_bits_that_its_number_gives_alone(name, dtype):
    numbers = [0.1, 0.003]  # neither is exact in float32 or float64
    theta, task_loss = regression(dtype=dtype)
    alpha = torch.tensor(numbers, dtype=torch.float64)[:, None]  # (S, 1)
    META_LEARNERS[name](theta, task_loss, learned_alpha(theta, alpha) if name == "meta-sgd" else alpha, M, 2)
    for s, number in enumerate(numbers):
        expected, _ = regression(dtype=dtype)
        step_sizes = learned_alpha(expected, number) if name == "meta-sgd" else number
        META_LEARNERS[name](expected, task_loss, step_sizes, M, 2)
        for key in theta:
            assert theta[key].grad.dtype == dtype and torch.equal(theta[key].grad[s], expected[key].grad[s])
    assert not torch.equal(theta["w"].grad[0], expected["w"].grad[0])  # the runs' numbers do differ


def test_learned_alpha_starts_at_the_number_of_its_run_and_is_a_leaf():
    theta, _ = regression(dtype=torch.float32)
    for alpha, numbers in ((0.1, [0.1, 0.1]), (torch.tensor([[0.1], [0.003]], dtype=torch.float64), [0.1, 0.003])):
        for key, learned in learned_alpha(theta, alpha).items():
            assert learned.is_leaf and learned.requires_grad and learned.shape == theta[key].shape
            for s, number in enumerate(numbers):
                assert torch.equal(learned[s], torch.full_like(theta[key][s], number))


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


def test_sinusoid_regression_adapts_in_one_step():
    """The supervised experiment of Finn et al. 2017 with maml.py alone: amplitudes [0.1, 5], phases [0, π]."""
    torch.manual_seed(0)
    theta, sinusoids = sinusoid_problem()
    optimizer = torch.optim.Adam(theta.values(), lr=0.003)
    for _ in range(300):
        maml(theta, sinusoids(*sample_sinusoids(25)), alpha=0.01, num_tasks=25)
        optimizer.step()
    held_out = sinusoids(*sample_sinusoids(200))
    before = held_out(expand(theta, 200)).mean().item()
    after = held_out(adapt(expand(theta, 200), held_out, 0.01)).mean().item()
    assert after < 0.8 * before


def sample_sinusoids(num_tasks):
    """Amplitude and phase, (1, M, 1, 1) each."""
    return 0.1 + 4.9 * torch.rand(1, num_tasks, 1, 1), math.pi * torch.rand(1, num_tasks, 1, 1)


def sinusoid_problem():
    """θ of a 1-40-40-1 network for one run, and sinusoids(amplitude, phase) -> task_loss on 10 fresh points a task."""
    sizes = [1, 40, 40, 1]
    theta = {}
    for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        theta[f"w{i}"] = (torch.randn(1, 1, n, m) / math.sqrt(n)).requires_grad_()
        theta[f"b{i}"] = torch.zeros(1, 1, 1, m, requires_grad=True)

    def sinusoids(amplitude, phase):
        def task_loss(params):
            x = 10 * torch.rand(1, amplitude.shape[1], 10, 1) - 5
            h = (x @ params["w0"] + params["b0"]).relu()
            h = (h @ params["w1"] + params["b1"]).relu()
            return (h @ params["w2"] + params["b2"] - amplitude * (x - phase).sin()).square().mean((2, 3))

        return task_loss

    return theta, sinusoids


def test_reptile_returns_what_it_adapted_and_its_gradient_is_the_way_from_there():
    a, c, x, task_loss = quadratics()
    theta = {"x": x.clone().requires_grad_()}
    adapted = reptile(theta, task_loss, ALPHA, M, inner_steps=3)
    torch.testing.assert_close(adapted["x"], c + (1 - ALPHA * a) ** 3 * (x - c))  # as derived by hand above
    assert not adapted["x"].requires_grad
    torch.testing.assert_close(theta["x"].grad, x - adapted["x"].mean(1, keepdim=True))
