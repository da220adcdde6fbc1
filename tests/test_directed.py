"""The δ-step, written out by hand, against `directed()` around every meta-learner."""

import math

import pytest
import torch

from directed import directed
from maml import LEARNERS, expand, maml
from tests.test_maml import ALPHA, FUNCTIONS, M, S, alpha_of, quadratics, regression


def medium_of(seed=1):
    """A loss (S, 1) on other data than the tasks'."""
    _, loss = regression(seed)
    return lambda params: loss(expand(params, M))[:, :1]


def test_delta_zero_changes_nothing():
    plain, task_loss = regression()
    with_delta, _ = regression()
    maml(plain, task_loss, ALPHA, M)
    directed(maml, 0.0)(with_delta, medium_of(), task_loss, ALPHA, M)
    for key in plain:
        assert torch.equal(plain[key], with_delta[key]) and torch.equal(plain[key].grad, with_delta[key].grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_directed_is_the_hand_written_delta_step_and_then_the_learner(name):
    delta, learner = 0.03, LEARNERS[name].function
    theta, task_loss = regression()
    expected, _ = regression()
    alpha, expected_alpha = alpha_of(name, theta), alpha_of(name, expected)
    directed(learner, delta)(theta, medium_of(), task_loss, alpha, M)

    loss = medium_of()(expected).sum()
    gradients = torch.autograd.grad(loss, list(expected.values()))
    moved = [p - delta * g for p, g in zip(expected.values(), gradients, strict=True)]
    expected = {key: p.detach().requires_grad_() for key, p in zip(expected, moved, strict=True)}
    learner(expected, task_loss, expected_alpha, M)
    for key in theta:
        torch.testing.assert_close(theta[key], expected[key], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(theta[key].grad, expected[key].grad, rtol=1e-12, atol=1e-12)
    if LEARNERS[name].learns_alpha:
        for key in theta:
            assert torch.equal(alpha[key], torch.full_like(alpha[key], ALPHA))  # the δ-step never touches α
            torch.testing.assert_close(alpha[key].grad, expected_alpha[key].grad, rtol=1e-12, atol=1e-12)


def test_the_step_is_in_place_so_that_optimisers_keep_leaves_and_state():
    theta, task_loss = regression()
    leaves = list(theta.values())
    optimizer = torch.optim.Adam(theta.values(), lr=0.01)
    for _ in range(2):
        directed(maml, 0.03)(theta, medium_of(), task_loss, ALPHA, M)
        optimizer.step()
    assert all(p is leaf and p.is_leaf for p, leaf in zip(theta.values(), leaves, strict=True))
    assert all(optimizer.state[p]["step"] == 2 for p in theta.values())


def test_every_run_takes_a_delta_of_its_own():
    a, c, x, task_loss = quadratics()
    deltas = torch.tensor([0.0, 0.5], dtype=torch.float64)
    theta = {"x": x.clone().requires_grad_()}
    directed(maml, deltas)(theta, lambda params: 0.5 * params["x"] ** 2, task_loss, ALPHA, M)
    torch.testing.assert_close(theta["x"].detach(), x * (1 - deltas[:, None]))  # θ − δθ


def test_a_delta_that_is_changed_in_place_is_that_of_the_next_step():
    _, _, x, task_loss = quadratics()
    delta, theta = torch.zeros(S, dtype=torch.float32), {"x": x.clone().requires_grad_()}
    learner = directed(maml, delta)
    for changed in (0.0, 0.5):
        delta.fill_(changed)
        learner(theta, lambda params: 0.5 * params["x"] ** 2, task_loss, ALPHA, M)
        torch.testing.assert_close(theta["x"].detach(), x * (1 - changed))


@pytest.mark.parametrize("delta", [-0.001, math.nan, math.inf, [0.1, -0.1], [[0.1] * S]])
def test_a_delta_that_makes_no_sense_is_refused(delta):
    with pytest.raises(ValueError, match="directed: delta is .*expected a finite number >= 0"):
        directed(maml, delta)


@pytest.mark.parametrize("arguments", [(ALPHA, M), (), (None, ALPHA, M)])
def test_a_forgotten_medium_loss_is_refused(arguments):
    theta, task_loss = regression()
    before = {key: p.detach().clone() for key, p in theta.items()}
    with pytest.raises(ValueError, match=r"directed: task_loss is .*expected \(theta, medium_loss, task_loss, ...\)"):
        directed(maml, 0.1)(theta, task_loss, *arguments)
    with pytest.raises(ValueError, match="directed: task_loss is None"):
        directed(maml, 0.1)(theta, task_loss, alpha=ALPHA, num_tasks=M)
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in theta.items())


WRONG_CALLS = {
    "delta (3,) for 2 runs": ([0.1, 0.2, 0.3], {}, r"delta is \[0.1, 0.2, 0.3\] for 2 runs; expected a number"),
    "a loss for each task": (0.1, {"medium": lambda loss: loss.expand(S, M)}, r"the medium loss has shape \(2, 3\)"),
    "a loss for each run": (0.1, {"medium": lambda loss: loss[:, 0]}, r"the medium loss has shape \(2,\)"),
    "a loss for all": (
        0.1,
        {"medium": lambda loss: loss.sum()},
        r"the medium loss has shape \(\).*expected a loss \(S, 1\)",
    ),
    "frozen": (0.1, {"w": lambda p: p.detach()}, "parameter 'w' has requires_grad=False; make it a leaf"),
    "expanded": (0.1, {"w": lambda p: p.expand(-1, M, 2, 3)}, r"parameter 'w' \(2, 3, 2, 3\)"),
}


@pytest.mark.parametrize("delta, changes, message", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_mistaken_call_is_one_clear_error_and_theta_stays(delta, changes, message):
    theta, task_loss = regression()
    theta["w"] = changes.get("w", lambda p: p)(theta["w"])
    before = {key: p.detach().clone() for key, p in theta.items()}
    right_loss, change = medium_of(), changes.get("medium", lambda loss: loss)
    with pytest.raises(ValueError, match="directed: .*" + message):
        directed(maml, delta)(theta, lambda params: change(right_loss(with_w_per_run(params))), task_loss, ALPHA, M)
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in theta.items() if p.is_leaf)


def test_a_parameter_that_the_medium_loss_does_not_use_is_named_and_theta_stays():
    theta, task_loss = regression()
    theta["spare"] = torch.zeros(S, 1, 2, requires_grad=True)
    before = {key: p.detach().clone() for key, p in theta.items()}
    with pytest.raises(ValueError, match="directed: the medium loss does not use parameter 'spare'"):
        directed(maml, 0.1)(theta, medium_of(), task_loss, ALPHA, M)
    assert all(torch.equal(p, before[key]) for key, p in theta.items())


def with_w_per_run(params):
    """The parameters that the medium loss can be computed from, also where w was expanded by mistake."""
    return {key: p[:, :1] for key, p in params.items()}
