"""Where tensors are, and an epoch that is one CUDA graph, whose rollouts' steps are compiled."""

import math
import os
import sys
import warnings
from functools import partial

import torch

from harness.checkpoints import RunError
from harness.errors import first_line

WARM_UP = 3  # epochs before a recording: they compile, and libraries allocate what they need
# Products by Triton, which take the bias and the activation into their kernel: measured faster for 1 and for 256 runs.
# Triton has none in float64, and torch offers none on GPUs with fewer than 68 multiprocessors.
TRITON_PRODUCTS = {
    "max_autotune": True, "max_autotune_gemm_backends": "TRITON",
    "autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False,  # else it prints what it tried
}  # fmt: skip


def choose_device(name, env):
    """The device for --device `name`: auto is cuda where there is one, but cpu for gymnasium's environments."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: no CUDA device is available to torch; use --device cpu", 2)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() and not env.is_gymnasium else "cpu"
    return name


def memory(device="cpu"):
    """Bytes of memory that this machine, or its CUDA device, has; infinity where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def step_compiler(device):
    """A function that compiles a rollout's time step, with Triton's products where there are any; None, and one line,
    where nothing compiles: no Triton, no C compiler."""
    if device == "cpu":
        return None
    warnings.filterwarnings("ignore", module=r"torch\._inductor")  # that TF32 is not used; that torch calls itself
    x = torch.zeros(2, 16, 16, device=device)
    for options in (TRITON_PRODUCTS, None):
        compiler = partial(compiled, options=options)
        try:
            compiler(lambda x: (x @ x).tanh() + 1)(x)  # a product, and what needs a kernel of its own
            return compiler
        except Exception as error:  # whatever a compiler may raise
            failure = error
    say("a rollout's step is not compiled, so rollouts are slower", failure)
    return None


def compiled(step, options=None):
    """A time step as one compiled function for each shape. torch caches the code on the disk for the next command."""
    # one shape for the tasks, one each for the medium task, the evaluation and what is left when a run has failed
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(step, dynamic=False, options=options)


class Recorded:
    """A function of a batch as one CUDA graph: its kernels then run without Python between them.

    The function must change tensors in place and ask nothing of the host. Its first calls are real ones; then it is
    recorded, and replayed from there on; for another batch, or other options, anew. On a CPU, under several ranks, with
    gymnasium's environments, which are sampled there, and where recording fails it is called as it is.
    """

    def __init__(self, function):
        self.function, self.fixed, self.stream = function, None, None
        self.calls, self.graph, self.returned = 0, None, None

    def __call__(self, batch):
        if batch.device != "cuda" or batch.env.is_gymnasium:
            return self.function(batch)
        options = {name: x for name, x in batch.learner_options.items() if not isinstance(x, torch.Tensor)}
        fixed = batch, options  # what a recording cannot change
        if fixed != self.fixed:
            self.fixed, self.calls, self.graph, self.returned = fixed, 0, None, None
        if self.calls == WARM_UP:
            self.record(batch)
        self.calls += 1
        if self.graph is None:
            return self.warm_up(batch) if self.calls <= WARM_UP else self.function(batch)
        self.graph.replay()
        return self.returned

    def warm_up(self, batch):
        """A real call on a stream of its own, as torch asks for before a recording."""
        self.stream = self.stream or torch.cuda.Stream()  # each stream has memory of its own
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            returned = self.function(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return returned

    def record(self, batch):
        """Nothing is computed while it is recorded, so where that fails nothing has changed."""
        if batch.ranks.count > 1:
            return say("epochs are not recorded as a CUDA graph, since several ranks exchange gradients")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.returned = self.function(batch)
            self.graph = graph
        except RuntimeError as error:
            say("epochs run one by one, so more slowly: no CUDA graph can be recorded", error)


def say(line, error=None):
    reason = "" if error is None else f" ({first_line(error)[:200]})"
    print(f"run.py: {line}{reason}", file=sys.stderr)
