"""The β-step, with a step size for each run."""

import torch


def of_each_run(step_sizes, p):
    """Step sizes (S,) in the shape that multiplies a parameter (S, 1, ...)."""
    return step_sizes.to(p).view(-1, *[1] * (p.dim() - 1))


class SGD:
    """The plain step p ← p − β p.grad with a β for each run: step_sizes, (S,) for each parameter (S, 1, ...)."""

    def __init__(self, params, step_sizes, state):
        self.params, self.step_sizes, self.state = params, step_sizes, state

    @torch.no_grad()
    def step(self):
        for p, beta in zip(self.params, self.step_sizes, strict=True):
            p -= of_each_run(beta, p) * p.grad


class Adam(SGD):
    """torch.optim.Adam with a β for each run (Kingma, Ba 2015), on tensors alone: torch's own asks the host for the
    number of its steps. state: {index of the parameter: {step, exp_avg, exp_avg_sq}}, changed in place."""

    @torch.no_grad()
    def step(self):
        for i, (p, beta) in enumerate(zip(self.params, self.step_sizes, strict=True)):
            steps, mean, mean_square = (self.state[i][name] for name in ("step", "exp_avg", "exp_avg_sq"))
            steps += 1
            mean.lerp_(p.grad, 1 - 0.9)
            mean_square.mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
            unbiased, unbiased_square = 1 - 0.9 ** steps.double(), 1 - 0.999 ** steps.double()
            scale = (mean_square / unbiased_square.to(p)).sqrt() + 1e-8
            p -= of_each_run(beta, p) * (mean / unbiased.to(p)) / scale


OPTIMIZERS = {"sgd": SGD, "adam": Adam}
