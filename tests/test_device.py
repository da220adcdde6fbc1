"""An epoch asks nothing of the host, compiled steps are the eager ones, and a GPU's numbers are a CPU's."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import envs
import policies
import run
from harness import device, ranks, sampling
from harness.log import Rows
from harness.plan import make_env
from harness.settings import algorithms, parse
from harness.start import new_runs

FAMILIES = list(envs.ENVS)
SIZES = ["--seed", "1", "2", "--tasks", "2", "--trajectories", "4", "--horizon", "5", "--hidden", "8"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def make_batch(place, *words, env="cartpole", algo="maml", compiled=None):
    """A batch that samples with torch on the device `place`, whatever that is."""
    args = parse(["--env", env, "--algo", algo, *SIZES, *words])
    family = make_env(args)
    head = policies.make_head(family.actions)
    sample = sampling.DeviceSampler(family, head, place, compiled)
    return run.Batch(new_runs(args, family), family, head, sample, place, ranks.Ranks(), Rows(writes=False))


class NothingOfTheHost(TorchDispatchMode):
    """Fails where an operation reads or writes a tensor that is not on the meta device, which has no numbers to give:
    a recorded graph would repeat the number of its recording for ever, or could not be recorded at all."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves([args, kwargs, returned]):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                raise AssertionError(f"{function} has a tensor on {x.device}")
        return returned


# A directed epoch has all that the undirected one has.
EPOCHS = [("--algo", algo) for algo in ("maml", *(algo for algo in algorithms() if algo.startswith("directed-")))]
EPOCHS += [("--env", env, "--algo", "directed-maml", "--rl", rl) for env in FAMILIES for rl in policies.LOSSES]
EPOCHS += [("--algo", "directed-maml", *words.split()) for words in (
    "--optimizer adam", "--outer-steps 3 --clip 0.2 --kl-penalty 0.1", "--oracle", "--inner-steps 0", "--inner-steps 2",
    "--medium pooled --tasks 4", "--medium random", "--medium sampled", "--medium median", "--medium 7",
    "--advantages raw --estimator dice", "--baseline step", "--baseline linear", "--task-dist bimodal",
    "--values 5 6 7 --medium random", "--delta-schedule decay",
)]  # fmt: skip


@pytest.mark.parametrize("words", EPOCHS, ids=" ".join)
def test_an_epoch_asks_nothing_of_the_host(words):
    batch = make_batch("meta", "--horizon", "2", *words)
    batch.set_schedules()
    with NothingOfTheHost():
        measured = run.train_epoch(batch)
    assert all(x.shape == (2,) and x.device.type == "meta" for x in measured.values())


def test_the_guard_sees_a_number_that_the_host_asks_for_or_gives():
    x = torch.ones(2, device="meta")
    for wrong in (lambda: x + torch.tensor(1.0), lambda: x.sum().item(), lambda: x.cpu(), lambda: x.to("cpu")):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingOfTheHost():
            wrong()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theta_after(batch, epochs=3):
    for _ in range(epochs):
        batch.set_schedules()
        run.train_epoch(batch)
    return batch.position().cpu()


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("env", FAMILIES)
def test_numpy_and_torch_roll_out_the_same(env, place, float64):
    """θ after three epochs, sampled by torch on a device and by numpy."""
    ours, theirs = make_batch(place, env=env, algo="directed-maml"), make_batch("cpu", env=env, algo="directed-maml")

    def rollout(params, phi, noise):
        return envs.rollout(theirs.env, policies.actor(params, theirs.head), phi, noise)

    theirs = run.Batch(theirs.runs, theirs.env, theirs.head, sampling.HostSampler(rollout), "cpu", theirs.ranks, None)
    torch.testing.assert_close(theta_after(ours), theta_after(theirs), rtol=0, atol=1e-12)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("env", FAMILIES)
def test_a_compiled_step_is_the_eager_one(env, float64):
    """θ after three epochs."""
    thetas = [theta_after(make_batch("cpu", env=env, compiled=compiled)) for compiled in (None, device.compiled)]
    torch.testing.assert_close(*thetas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("working", [[device.TRITON_PRODUCTS, None], [None], []])
def test_a_step_is_compiled_as_well_as_it_can_be(working, monkeypatch, capsys):
    """Triton has no products in float64 and on small GPUs; where nothing compiles a line says so."""

    def compiled(step, options):
        if options not in working:
            raise RuntimeError("no choices")
        return lambda *args: options

    monkeypatch.setattr(device, "compiled", compiled)
    compiler = device.step_compiler("meta")
    if working:
        assert compiler(None)() == working[0]
    else:
        assert compiler is None
        assert capsys.readouterr().err.count("is not compiled, so rollouts are slower (RuntimeError: no choices)") == 1


def test_an_epoch_whose_environments_are_on_the_cpu_is_never_recorded():
    """A recording that fails leaves torch on the recording's stream."""
    batch = SimpleNamespace(device="cuda", env=SimpleNamespace(is_gymnasium=True))
    epoch = device.Recorded(lambda batch: "called")
    assert [epoch(batch) for _ in range(device.WARM_UP + 2)] == ["called"] * (device.WARM_UP + 2)


def test_torch_knows_the_compiler_s_options():
    assert set(device.TRITON_PRODUCTS) <= set(torch._inductor.list_options())
