"""A finished run in Python: load, adapt, act; what is untrusted runs no code."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import envs
import policies
import run
from harness import trained, watch
from harness.checkpoints import RunError
from harness.plan import make_env
from harness.settings import parse
from tests.commands import rows, train
from tests.test_checkpoints import changed, empty, hostile, saved, state_with

RUN = "cartpole-pg/fomaml/seed1"
CARTPOLE, VELOCITY, PENDULUM = RUN, "velocity-ac/meta-sgd/seed1", "Pendulum-v1-pg/fomaml/seed1"


@pytest.fixture(scope="module")
def balancing(tmp_path_factory):
    """The folder of a CartPole run that has learned, evaluated on 20 trajectories a task."""
    out = tmp_path_factory.mktemp("balancing")
    words = ["--trajectories", 20, "--tasks", 3, "--horizon", 200, "--hidden", 32, "--beta", 0.01, "--eval-steps", 1]
    train(out, *words, "--eval-every", 20, algo="directed-fomaml", epochs=20)
    return out / "cartpole-pg/directed-fomaml/delta0.005/seed1"


# --- it learned ---


def test_adapted_to_gravity_12_it_balances_gymnasiums_cartpole_as_long_as_eval_csv_says(balancing):
    policy = replace(trained.load(balancing).adapt(phi=[12.0]), rng=np.random.default_rng(0))
    env = gymnasium.make("CartPole-v1", max_episode_steps=200)
    env.unwrapped.gravity = 12.0
    lengths = []
    for seed in range(40):
        obs, _ = env.reset(seed=seed)
        over, length = False, 0
        while not over:
            obs, _, terminated, truncated, _ = env.step(policy.act(obs))
            over, length = terminated or truncated, length + 1
        lengths.append(length)
    evaluation = {(row["phi"], row["step"]): float(row["return"]) for row in rows(balancing / "eval.csv")}
    error = (
        np.std(lengths) / np.sqrt(40) * np.sqrt(2)
    )  # of the difference of two means of 40 episodes: of two tasks there
    assert abs(np.mean(lengths) - (evaluation["11.5", "1"] + evaluation["12.5", "1"]) / 2) < 4 * error
    assert np.mean(lengths) > 60  # a random policy falls after 20 steps


# --- act ---


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("folder", "env_id"), [(CARTPOLE, "CartPole-v1"), (PENDULUM, "Pendulum-v1")])
def test_actions_are_those_that_the_environment_takes(small, folder, env_id, greedy):
    policy, env = trained.load(small / folder), gymnasium.make(env_id)
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        action = policy.act(obs, greedy=greedy)
        assert env.action_space.contains(action)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()


@pytest.mark.parametrize("folder", [CARTPOLE, VELOCITY])
def test_actions_are_drawn_from_the_policys_distribution_and_greedy_ones_are_its_mode(small, folder):
    policy = replace(trained.load(small / folder), rng=np.random.default_rng(0))
    obs = torch.full((1, 1, policy.env.obs_dim), 0.5)
    outputs = trained.policies.mlp(policy.theta, "policy")(obs)[0, 0].detach()
    drawn = np.array([policy.act(obs) for _ in range(2000)]).reshape(2000, -1)
    greedy = policy.act(obs.flatten().tolist(), greedy=True)
    if folder == CARTPOLE:
        probability = float(outputs.softmax(-1)[1])
        assert abs(drawn.mean() - probability) < 4 * np.sqrt(0.25 / 2000)
        assert greedy == int(outputs.argmax())
    else:  # −0.5 to 0.5, clipped normal: its median is that of the normal
        assert drawn.min() == -0.5 and drawn.max() == 0.5
        assert abs(np.median(drawn) - 0.5 * float(outputs)) < 4 * 0.5 * 1.2533 / np.sqrt(2000)  # √(π/2) σ/√n
        assert greedy == pytest.approx([0.5 * float(outputs)])


# --- adapt ---


def as_episodes(env, trajectories):
    """Trajectories (1, 1, K, ...) as a user has them: observations, with the last one of an episode that did not
    terminate; actions as the environment took them; rewards."""
    episodes = []
    for k in range(trajectories["mask"].shape[2]):
        length = int(trajectories["mask"][0, 0, k].sum())
        obs, actions, rewards = (trajectories[key][0, 0, k, :length] for key in ("obs", "actions", "rewards"))
        if not trajectories["terminated"][0, 0, k]:
            obs = torch.cat([obs, trajectories["last_obs"][0, 0, k, None]])
        actions = actions.numpy()
        if not isinstance(env.actions, int):
            actions = envs.in_box(actions, *(np.array(bound, np.float32) for bound in env.actions))
        episodes.append((obs.numpy(), actions, rewards.tolist()))
    return episodes


@pytest.mark.parametrize(("folder", "phi"), [(CARTPOLE, [12.0]), (VELOCITY, [1.7])])
def test_adapting_to_episodes_is_adapting_to_the_task_that_they_come_from(small, monkeypatch, folder, phi):
    policy = trained.load(small / folder)
    sample, episodes = trained.Policy.sample, []

    def recorded(self, *args):
        trajectories = sample(self, *args)
        if not isinstance(self.env.actions, int):  # none outside of the box: see the next tests
            trajectories["actions"] = trajectories["actions"].clamp(-0.99, 0.99)
        episodes.append(as_episodes(self.env, trajectories))
        return trajectories

    monkeypatch.setattr(trained.Policy, "sample", recorded)
    to_task = policy.adapt(phi=phi, steps=2)
    to_episodes = policy.adapt(episodes=episodes)
    assert len(episodes) == 2
    for name in policy.theta:
        torch.testing.assert_close(to_episodes.theta[name], to_task.theta[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(to_task.theta[name], p) for name, p in policy.theta.items())


def test_a_clipped_action_has_the_score_that_the_actions_beyond_have_on_average():
    """Of N(μ, σ²), for both ends of the box: E[∇ log p(a) | a ≥ 1], by quadrature in float64."""
    raw = torch.tensor([[[[0.3]]]], dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([[[0.4]]], dtype=torch.float64, requires_grad=True)
    own, taken, params = policies.Gaussian(1), trained.AsTaken(1), {"policy.raw_std": raw}
    width = 1e-4
    beyond = (1 + width * (torch.arange(200_000, dtype=torch.float64) + 0.5)).view(1, -1, 1)

    def score(loss):
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, (mean, raw))])

    for sign in (1, -1):
        logs = own.log_prob(params, mean, sign * beyond)
        probability = width * logs.detach().exp().sum()
        expected = score(width * (logs.detach().exp() * logs).sum() / probability)
        end = torch.tensor([[[sign]]], dtype=torch.float64)
        got = taken.log_prob(params, mean, end).sum()
        torch.testing.assert_close(got.exp(), probability, rtol=1e-7, atol=0)
        torch.testing.assert_close(score(got), expected, rtol=1e-7, atol=0)
    inside = torch.tensor([[[-0.99], [0.2], [0.99]]], dtype=torch.float64)
    assert torch.equal(taken.log_prob(params, mean, inside), own.log_prob(params, mean, inside))


def test_episodes_with_clipped_actions_move_the_policy_as_adapting_to_their_task_does(tmp_path, monkeypatch):
    """Velocity, most of whose actions are clipped: on 3000 episodes the step is the same but for sampling noise. By the
    density of the clipped action itself, σ's would be far off."""
    train(tmp_path, "--horizon", 3, "--advantages", "raw", env="velocity", epochs=1)
    policy = trained.load(tmp_path / "velocity-pg/fomaml/seed1")
    policy.settings["trajectories"] = 3000
    policy.theta["policy.raw_std"] += 1.0
    sample, episodes = trained.Policy.sample, []

    def recorded(self, *args):
        trajectories = sample(self, *args)
        episodes.append(as_episodes(self.env, trajectories))
        return trajectories

    monkeypatch.setattr(trained.Policy, "sample", recorded)
    to_task = policy.adapt(phi=[1.7], steps=1)
    actions = np.concatenate([taken for _, taken, _ in episodes[0]])
    assert (abs(actions) == 0.5).mean() > 0.5

    def steps(adapted):
        return torch.cat([(adapted.theta[name] - p).flatten() for name, p in policy.theta.items()])

    expected, got = steps(to_task), steps(policy.adapt(episodes=episodes))
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.99
    assert float(got.norm() / expected.norm()) == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(trained, "AsTaken", policies.Gaussian)
    assert abs(steps(policy.adapt(episodes=episodes)) - expected).max() > 20 * abs(got - expected).max()


def test_adapting_takes_the_runs_inner_steps_and_leaves_the_policy_as_it_was(small, tmp_path):
    train(tmp_path, "--inner-steps", 2, epochs=1)
    policy = trained.load(tmp_path / RUN)
    before = {name: p.clone() for name, p in policy.theta.items()}
    by_default, twice, once = (policy.adapt(phi=[12.0], steps=steps).theta for steps in (None, 2, 1))
    assert all(torch.equal(policy.theta[name], p) for name, p in before.items())
    assert all(torch.equal(by_default[name], twice[name]) for name in before)
    assert not all(torch.equal(once[name], twice[name]) for name in before)


def test_a_single_number_is_a_task_too(small):
    policy = trained.load(small / CARTPOLE)
    one, listed = policy.adapt(phi=12.0).theta, policy.adapt(phi=[12.0]).theta
    assert all(torch.equal(one[name], listed[name]) for name in one)


@pytest.mark.parametrize(
    ("observation", "says"),
    [
        ({"x": 1.0}, r"expected 4 numbers, a Dict or Tuple as gymnasium.spaces.flatten gives it \(TypeError"),
        ([1.0, 2.0, 3.0], "expected 4 numbers"),
        ([1.0, 2.0, 3.0, np.nan], "expected finite numbers"),
    ],
)
def test_an_observation_of_another_kind_is_refused(small, observation, says):
    with pytest.raises(ValueError, match=says):
        trained.load(small / CARTPOLE).act(observation)


OBS, ONE = np.zeros((3, 4)), [0.0] * 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give either phi or episodes"),
        ({"phi": [12.0], "episodes": []}, "give either phi or episodes"),
        ({"phi": [1.0, 2.0]}, r"phi 1 2: expected 1 number\(s\): gravity"),
        ({"phi": np.nan}, r"phi nan: expected 1 number\(s\): gravity"),
        ({"phi": 1e39}, r"phi 1e\+39: expected"),  # beyond float32
        ({"phi": {"gravity": 12}}, r"phi {'gravity': 12}: expected 1 number\(s\): gravity"),
        ({"phi": [None]}, "phi None: expected 1 number"),
        ({"episodes": [[(OBS, [0, 1], ONE)]]}, "episode 0: 3 observations of 4 numbers, 2 actions of 1, 3 rewards"),
        ({"episodes": [[(OBS, [0, 1, 0], ONE), (OBS[:, :3], [0, 1, 0], ONE)]]}, "episode 1: 3 observations of 3"),
        ({"episodes": [[(OBS[:2], [0, 1, 0], ONE)]]}, "2 observations of 4 numbers.*expected T or T . 1 observations"),
        ({"episodes": [[(OBS[:0], [], [])]]}, "0 observations of 4 numbers, .*T > 0"),
        ({"episodes": [[(OBS, np.zeros((3, 2)), ONE)]]}, "3 actions of 2, .*expected .* T actions of 1"),
        ({"episodes": [[(OBS, [0, 1, 0], np.zeros((3, 2)))]]}, "3 rewards of 2; expected"),
        ({"episodes": [[]]}, "a step without episodes"),
        ({"episodes": [(OBS, [0, 1, 0], ONE)]}, "expected T or T . 1 observations of 4"),
        ({"episodes": [[(OBS, [0, 1, 0])]]}, "episode 0: expected numbers, as .observations, actions, rewards."),
        ({"episodes": [[({"x": 1}, [0, 1, 0], ONE)]]}, "episode 0: expected numbers, as .observations, actions"),
        ({"episodes": [[(OBS * np.nan, [0, 1, 0], ONE)]]}, "episode 0: a number is not finite"),
        ({"episodes": [[(OBS, [0, 1, 0], [0, np.inf, 0])]]}, "episode 0: a number is not finite"),
        ({"episodes": [[(OBS, [0, 2, 0], ONE)]]}, "episode 0: an action is none of 0, 1"),
        ({"episodes": [[(OBS, [0, 0.5, 0], ONE)]]}, "episode 0: an action is none of 0, 1"),
    ],
)
def test_a_task_or_episodes_of_another_shape_are_refused(small, given, says):
    with pytest.raises(ValueError, match=says):
        trained.load(small / CARTPOLE).adapt(**given)


# --- untrusted runs ---


def settings_with(**changes):
    return changed(lambda state: state["settings"].update(changes))


DAMAGED = [
    (empty, "checkpoint.pt: its checksum is wrong"),
    (hostile, "checkpoint.pt: not a checkpoint that torch can read"),
    (saved([1]), "checkpoint.pt: not a checkpoint of this program"),
    (state_with(settings={}), "its settings or parameters are not those of a run"),
    (state_with(format=torch.zeros(2)), "its format is tensor([0., 0.])"),
    (settings_with(env="../../x"), "not those of a run (ArgumentError: name ../../x: unknown environment"),
    (settings_with(env=3), "its settings or parameters are not those of a run"),
    (settings_with(rl="x"), "its settings or parameters are not those of a run (ValueError: rl is 'x')"),
    (settings_with(gamma="large"), "its settings or parameters are not those of a run"),
    (settings_with(horizon=torch.zeros(2)), "its settings or parameters are not those of a run"),
    (settings_with(horizon="9"), "its settings or parameters are not those of a run"),
    (settings_with(range=3), "its settings or parameters are not those of a run"),
    (settings_with(range=["a", "b"]), "its settings or parameters are not those of a run"),
    (settings_with(horizon=0), "its settings or parameters are not those of a run (ValueError: horizon is 0)"),
    (settings_with(trajectories=-1), "its settings or parameters are not those of a run"),
    (settings_with(inner_steps="x"), "its settings or parameters are not those of a run"),
    (settings_with(seed=None), "its settings or parameters are not those of a run (ValueError: seed is None)"),
    (settings_with(seed="1-3"), "(ValueError: seed is '1-3')"),
    (settings_with(eval_steps=10**12), "(ValueError: eval_steps is 1000000000000)"),
    (settings_with(task_dist="x"), "(ValueError: task_dist is 'x')"),
    (settings_with(horizon=10**9), "(ValueError: episodes of 18000000000 numbers)"),  # 3 of 4 + 2 numbers a step
    (settings_with(env="\x1b[31m"), "(ArgumentError: name \\x1b[31m: unknown environment"),
    (settings_with(alpha=None), "its settings or parameters are not those of a run"),
    (state_with(theta=None), "its settings or parameters are not those of a run"),
    (state_with(theta=3), "its settings or parameters are not those of a run"),
    (changed(lambda state: state["theta"].clear()), "its settings or parameters are not those of a run"),
    (changed(lambda state: state["theta"].popitem()), "its settings or parameters are not those of a run"),
    (changed(lambda state: state.update(alpha={"x": 1})), "its settings or parameters are not those of a run"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGED)
def test_loading_an_untrusted_run_runs_no_code_and_says_what_is_wrong(small, monkeypatch, tmp_path, damage, says):
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "hostile"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((small / RUN / "checkpoint.pt").read_bytes())
    damage(path)
    with pytest.raises(RunError) as error:
        trained.load(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "hostile").exists()


def test_an_environment_that_is_a_modules_code_is_made_only_if_the_caller_names_it(
    small, monkeypatch, tmp_path, capsys
):
    name = "module_of_a_stranger:Theirs-v0"
    code = "import gymnasium; gymnasium.register('Theirs-v0', 'gymnasium.envs.classic_control:PendulumEnv', "
    code += "max_episode_steps=9); open('ran', 'w')"
    (tmp_path / "module_of_a_stranger.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((small / PENDULUM / "checkpoint.pt").read_bytes())
    settings_with(env=name)(path)
    for trusted in (None, "another_module:Theirs-v0", "Pendulum-v1"):
        says = f"runs the code of module '{name}'; .* give --env '{name}' too, or in Python trusted_env='{name}'"
        with pytest.raises(RunError, match=says):
            trained.load(tmp_path, trusted)
    with pytest.raises(SystemExit) as stop:
        run.main(["--watch", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert trained.load(tmp_path, name).env.obs_dim == 3 and (tmp_path / "ran").exists()


def test_loading_applies_all_that_training_applied_to_the_task_family(tmp_path):
    words = ["--task-dist", "skewed", "--range", 4, 8, "--oracle", "--horizon", 5]
    train(tmp_path, *words, epochs=1)
    env = trained.load(tmp_path / RUN).env
    assert env == make_env(parse(["--env", "cartpole", "--algo", "fomaml", *map(str, words)]))
    assert watch.default_task(env) == [4 + (8 - 4) / 4]  # E u³ = 1/4
