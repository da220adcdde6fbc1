"""maml.py and directed.py work in another project, with torch as their only import; policies.py and envs.py with torch
and numpy."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

from harness import processes

REPOSITORY = Path(__file__).parent.parent
OURS = {path.stem for path in REPOSITORY.glob("*.py")} | {"harness"}
OTHERS = {"numpy", "gymnasium", "tqdm", "matplotlib"}
USES = {
    "maml": """
        import torch
        from maml import imaml, maml, sharp
        theta = {"x": torch.ones(1, 1, requires_grad=True)}
        goals = torch.tensor([[1.0, 2.0, 3.0]])
        loss = lambda params: (params["x"] - goals).square()
        maml(theta, loss, 0.1, 3)
        assert torch.allclose(theta["x"].grad, torch.tensor([[-2 * 0.8**2 * (1 + 2.0)]]))  # 2(1−2α)²(x−goal)
        imaml(theta, loss, 0.1, 3, inner_steps=1, lambda_=2.0, cg_steps=1, cg_damping=0)
        assert torch.allclose(theta["x"].grad, torch.tensor([[-2 * 0.8 * (1 + 2.0) / (1 + 2 / 2.0)]]))
        sharp(maml, 0.5)(theta, loss, 0.1, 3)  # at x = 1 − 0.5
        assert torch.allclose(theta["x"].grad, torch.tensor([[-2 * 0.8**2 * 4.5]]))
    """,
    "directed": """
        import torch
        from directed import directed
        theta = {"x": torch.ones(1, 1, requires_grad=True)}
        directed(lambda theta, task_loss: None, 0.25)(theta, lambda params: params["x"].square(), lambda params: None)
        assert torch.allclose(theta["x"].detach(), torch.tensor([[0.5]]))  # 1 − 0.25·2
    """,
    "policies": """
        import torch
        from policies import Gaussian, actor, init
        theta = init(3, Gaussian(2), lambda *shape: torch.rand(1, 1, *shape))
        act = actor({name: p.detach().numpy() for name, p in theta.items()}, Gaussian(2))
        assert act(torch.ones(1, 4, 3).numpy(), torch.zeros(1, 4, 2).numpy()).shape == (1, 4, 2)
    """,
    "envs": """
        import envs
        env, stream = envs.make("cartpole", horizon=5), envs.stream([1], envs.TASKS)
        phi, noise = envs.sample_tasks(env, stream, 2), envs.draw_noise(env, stream, range(2), 3)
        trajectories = envs.rollout(env, lambda obs, noise: noise.argmax(-1), phi, noise)
        assert (trajectories["rewards"].sum(-1) == 5).all()
    """,
}
WITH_NUMPY = ("policies", "envs")


class TorchAlone:
    """The project's other packages fail on import, and its other modules are not to be found."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name in self.packages:
            raise ModuleNotFoundError(f"{name} is not to be imported")


def use_alone(folder, program, packages):
    """In a process forked from this one, which has torch loaded: as if none of the packages had been."""
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in {*packages, *OURS}]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(x for x in sys.path if x and Path(x).resolve() != REPOSITORY)]
    sys.meta_path.insert(0, TorchAlone(packages))
    exec(textwrap.dedent(program), {})


def test_a_module_copied_into_an_empty_folder_works(tmp_path):
    """And one that needs a package or a module of ours does not."""
    for module, program in (*USES.items(), ("run", "import run")):
        folder = tmp_path / module
        folder.mkdir()
        shutil.copy(REPOSITORY / f"{module}.py", folder)
        packages = OTHERS - {"numpy"} if module in WITH_NUMPY else OTHERS
        process = processes.context().Process(target=use_alone, args=(folder, program, packages))
        process.start()
        process.join(60)
        assert (process.exitcode == 0) == (module in USES), module
