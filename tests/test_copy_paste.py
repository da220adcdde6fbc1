"""maml.py and directed.py, and learners.py with maml.py, work in another project, with torch as their only import."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# Whatever is not torch's own need is made to fail on import, siblings and the project's other packages first of all.
PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numpy", "gymnasium", "tqdm", "matplotlib", "envs", "policies", "run", "report"}:
            raise ModuleNotFoundError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refuse())
import torch
for folder, use in USES.items():
    sys.path.insert(0, folder)
    exec(use)
    sys.path.remove(folder)
    sys.modules.pop("maml", None)
    print(folder, "works")
"""
USES = {
    "maml.py": """
        from maml import maml, adapt, expand
        theta = {"x": torch.ones(1, 1, requires_grad=True)}
        goals = torch.tensor([[1.0, 2.0, 3.0]])
        loss = lambda params: (params["x"] - goals).square()
        maml(theta, loss, 0.1, 3)
        torch.testing.assert_close(theta["x"].grad, torch.tensor([[-2 * 0.8**2 * (1 + 2.0)]]))  # 2(1−2α)²(x−goal)
    """,
    "directed.py": """
        from directed import directed
        theta = {"x": torch.ones(1, 1, requires_grad=True)}
        directed(lambda theta, task_loss: None, 0.25)(theta, lambda params: params["x"].square(), lambda params: None)
        torch.testing.assert_close(theta["x"].detach(), torch.tensor([[0.5]]))  # 1 − 0.25·2
    """,
    "learners.py": """
        from learners import imaml, sharp
        from maml import maml
        theta = {"x": torch.ones(1, 1, requires_grad=True)}
        goals = torch.tensor([[1.0, 2.0, 3.0]])
        imaml(theta, lambda params: (params["x"] - goals).square(), 0.1, 3, inner_steps=1, lambda_=2.0, cg_steps=1)
        torch.testing.assert_close(theta["x"].grad, torch.tensor([[-2 * 0.8 * (1 + 2.0) / (1 + 2 / 2.0)]]))
        sharp(maml, 0.5)(theta, lambda params: (params["x"] - goals).square(), 0.1, 3)  # at x = 1 − 0.5
        torch.testing.assert_close(theta["x"].grad, torch.tensor([[-2 * 0.8**2 * 4.5]]))
    """,
}
COPIED_WITH = {"learners.py": ["maml.py"]}


def test_a_module_copied_into_an_empty_folder_works(tmp_path):
    """Each in a folder of its own, alone or with what its docstring names, in one process."""
    uses = {module.removesuffix(".py"): textwrap.dedent(use) for module, use in USES.items()}
    for folder in uses:
        (tmp_path / folder).mkdir()
        for name in [f"{folder}.py", *COPIED_WITH.get(f"{folder}.py", [])]:
            shutil.copy(REPOSITORY / name, tmp_path / folder)
    (tmp_path / "use.py").write_text(f"USES = {uses!r}\n{PROGRAM}", encoding="utf-8")
    result = subprocess.run([sys.executable, "-W", "ignore", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "".join(f"{folder} works\n" for folder in uses)), result.stderr
