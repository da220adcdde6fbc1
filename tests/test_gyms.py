"""Parameters of gymnasium environments: paths, constructors' keywords, whole numbers, lists of tasks, refusals."""

import itertools
import json
import math
import os
import pickle
import random
import re
import sys
import types
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import envs
import run
from envs import ArgumentError
from harness import checkpoints, gyms, trained, trial, watch
from harness.gyms import FAMILIES, Gymnasium, make, seed_of
from harness.plan import make_env, plan
from harness.settings import parse
from tests.commands import REPOSITORY, refused, rows, train
from tests.noise import noise_of, tasks_of
from tests.test_envs import rollout


class Room(gymnasium.Env):
    """Pays what its parameters say; what it was built and run with is kept."""

    pull = 2.0  # of the class
    metadata = {"render_modes": []}
    observation_space = spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Box(-9, 9, (2,), np.float32)})
    action_space = spaces.Discrete(2)
    built, closed, seen = [], 0, []

    def __init__(self, size=3, tall=False, depth=None):
        self.size, self.level, self.switch, self._friction = size, 0, False, 1.0
        self.config = {"drag": 0.5, "count": 4, "name": "x"}
        self.model = types.SimpleNamespace(opt=types.SimpleNamespace(gravity=np.array([0.0, 0.0, -9.81])))
        self.grid = np.array([1, 2])
        Room.built.append(size)

    @property
    def friction(self):
        return self._friction

    @friction.setter
    def friction(self, value):
        self._friction = value

    @property
    def area(self):
        return self.size**2

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        Room.seen.append(self.level)
        return {"a": np.array([1.0, 2.0], np.float32), "b": 2}, {}

    def step(self, action):
        reward = self.pull + self.config["drag"] + self.model.opt.gravity[2] + self._friction + self.size
        reward += [0.0, 10.0, 20.0, 30.0][self.level] + self.grid[0] + len(range(self.config["count"]))
        return {"a": np.array([1.0, 3.0], np.float32), "b": 1}, reward, False, False, {}

    def close(self):
        Room.closed += 1


class Bonus(gymnasium.Wrapper):
    """A wrapper with a parameter of its own, by which it adds to the reward."""

    bonus = 0.0

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward + self.bonus, *rest


def room(size=3, tall=False, depth=None):
    return Bonus(Room(size, tall, depth))


gymnasium.register("Room-v0", room, max_episode_steps=3)
BASE = 2 + 0.5 - 9.81 + 1 + 3 + 0 + 1 + 4


def rewards(env, *tasks):
    """The reward of the first step on each task."""
    phi = np.array([tasks], np.float32)
    noise = {key: x.numpy() for key, x in noise_of(env, [0], 0, len(tasks), 1).items()}
    act = watch.random_actions(env)
    return envs.rollout(env, act, phi, noise)["rewards"][0, :, 0, 0].tolist()


# --- paths ---


@pytest.mark.parametrize(
    ("name", "before"),
    [("pull", 2), ("config[drag]", 0.5), ("friction", 1), ("bonus", 0), ("make.size", 3), ("unwrapped.pull", 2)],
)
def test_a_path_is_set_where_the_environment_reads_it(name, before):
    env = make("Room-v0", [name], [1.5, 4.5])
    assert env.phi_names == (name,) and env.horizon == 3
    assert rewards(env, [1.5], [4.25]) == pytest.approx([BASE - before + 1.5, BASE - before + 4.25], abs=1e-5)


def test_a_number_in_an_array_deep_inside():
    env = make("Room-v0", ["model.opt.gravity[2]", "pull"], [-15, -5, 0, 1])
    assert rewards(env, [-12.5, 0.25]) == pytest.approx([BASE + 9.81 - 12.5 - 2 + 0.25], abs=1e-5)


def test_a_constructors_keyword_makes_the_environment_anew_and_closes_the_old_one():
    env = make("Room-v0", ["make.size"], values=[3, 5])
    Room.built, Room.closed = [], 0
    assert rewards(env, [3], [5]) == pytest.approx([BASE, BASE + 2], abs=1e-5)
    rewards(env, [5], [3])
    assert Room.built[-4:] == [3, 5, 5, 3] and all(type(size) is int for size in Room.built)
    assert Room.closed == 3  # both of the first rollout, and the one with which the task was checked


def test_an_environment_that_cannot_be_pickled_is_made_anew_in_a_spawned_process():
    gymnasium.register("Local-v0", lambda: Bonus(Room()), max_episode_steps=3)
    env = make("Local-v0", ["pull"], [0, 1])
    again = pickle.loads(pickle.dumps(env))
    assert env.dynamics.instances and not again.dynamics.instances and rewards(again, [0.5]) == rewards(env, [0.5])


def test_dict_observations_are_flattened_as_gymnasium_does():
    env = make("Room-v0", ["pull"], [0, 1])
    noise = {key: x.numpy() for key, x in noise_of(env, [0], 0, 1, 1).items()}
    obs = envs.rollout(env, lambda obs, noise: noise.argmax(-1), np.array([[[1.0]]], np.float32), noise)["obs"]
    space = Room.observation_space
    expected = [spaces.flatten(space, {"a": np.array([1.0, x], np.float32), "b": b}) for x, b in ((2, 2), (3, 1))]
    assert env.obs_dim == 5 and np.array_equal(obs[0, 0, 0, :2], expected)


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (None, {}, r"say which .*one of: .*bonus, area.* config\[drag\], config\[count\], friction.*make.size$"),
        (["config[drg]"], {}, r"no such number; did you mean config\[drag\]\?"),
        (["frictoin"], {}, "did you mean friction?"),
        (["model.opt.gravty[2]"], {}, "no such number"),
        (["config[name]"], {}, "no such number"),
        (["nothing.at[all]"], {}, "no such number; choose from .*pull"),
        ([""], {}, "no such number"),
        (["make.sise"], {}, "did you mean make.size?"),
        (["step.__globals__[BASE]"], {}, "no such number"),
        (["switch"], {}, "switch: a switch of Room-v0, False"),
        (["make.tall"], {}, "make.tall: a switch of Room-v0, False"),
        (["area"], {"bounds": [1, 2]}, "area: Room-v0 does not take it"),
        (["level"], {"bounds": [0, 3]}, "values: Room-v0 takes whole numbers as level; list them"),
        (["config[count]"], {"bounds": [1, 9]}, r"takes whole numbers as config\[count\]"),
        (["grid[0]"], {"bounds": [1, 9]}, r"whole numbers as grid\[0\].*it is 4"),
        (["level"], {"values": [0, 7]}, "values: Room-v0 fails at level = 7 .IndexError"),
        (["level"], {"values": [0, 0.5]}, "values: Room-v0 fails at level = 0.5"),
        (["level"], {"values": [0, 1, 0]}, "values 0 1 0: duplicate task"),
        (["level", "pull"], {"values": [0, 1, 0]}, "expected 2 number.s. for each task: level, pull"),
        (["level"], {"values": [2**24 + 1]}, "whole ones up to 16777216"),
        (["closed"], {"values": [0, 1]}, "names closed: Room-v0 gives the same episode .* at 0 and 1"),
        (["model.opt.gravity[2]"], {"bounds": [5, 15]}, "is -9.81 in Room-v0, and 5 points upward"),
    ],
)  # fmt: skip
def test_what_is_no_parameter_is_refused_in_one_line(names, options, says):
    with pytest.raises(ArgumentError, match=says) as error:
        make("Room-v0", names, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("CartPole-v1", {"names": ["length"], "bounds": [0.2, 1]}, "constants that its constructor derived .* wrapper"),
        ("CartPole-v1", {"names": ["masspole"], "bounds": [0.2, 1]}, "constants that its constructor derived"),
        ("LunarLander-v3", {"names": ["gravity"], "bounds": [5, 15]}, "gravity is -10 .* and 5 points upward"),
        ("lunarlander", {"bounds": [-15, -5]}, "gravity is 10 .* -15 points upward"),
        ("nobody:MyEnv-v0", {}, "No module named 'nobody'"),
        ("MyEnv-v0", {}, "package:id where importing a package registers it"),
    ],
)
def test_physics_that_would_lie_and_packages_that_are_not_there_are_refused(name, options, says):
    with pytest.raises(ArgumentError, match=says) as error:
        make(name, **options)
    assert "\n" not in str(error.value)


def test_the_readmes_wrapper_is_cartpole_with_another_pole():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gymnasium.register" in block]
    exec(code, {})
    env = make("Pole-v0", ["length"], [0.2, 1])
    noise = {key: x.numpy() for key, x in noise_of(env, [0], 0, 1, 1).items()}
    got = envs.rollout(env, lambda obs, noise: noise.argmax(-1), np.array([[[0.25]]], np.float32), noise)
    cart = gymnasium.make("CartPole-v1").unwrapped
    cart.length, cart.polemass_length = 0.25, 0.025
    cart.reset(seed=seed_of(noise["reset"].item()))
    seen = [cart.step(int(action))[0] for action in got["actions"][0, 0, 0][got["mask"][0, 0, 0]]]
    assert len(seen) > 5 and np.array_equal(got["obs"][0, 0, 0, 1 : len(seen)], seen[:-1])


# --- rollouts ---


def plain_loop(env_id, attribute, value, seed, actions):
    """One episode by hand: gymnasium's own environment, and nothing around it."""
    env = gymnasium.make(env_id)
    setattr(env.unwrapped, attribute, value)
    obs, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        first, reward, terminated, truncated, _ = env.step(action)
        obs.append(first)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.array(obs, np.float32), np.array(rewards, np.float32), terminated, truncated


@pytest.mark.parametrize(
    ("name", "options", "env_id", "attribute", "sign", "values"),
    [
        ("lunarlander", {}, "LunarLander-v3", "gravity", -1, [5.0, 7.5, 10.0, 12.5, 15.0]),
        ("Pendulum-v1", {"names": ["g"], "bounds": [5, 15]}, "Pendulum-v1", "g", 1, [5.0, 15.0]),
        ("CartPole-v1", {"names": ["gravity"], "bounds": [5, 15]}, "CartPole-v1", "gravity", 1, [5.0, 15.0]),
    ],
)
def test_a_rollout_is_a_plain_loop_over_gymnasium(name, options, env_id, attribute, sign, values):
    env = make(name, horizon=250, **options)
    noise = noise_of(env, [3], 0, len(values), 2)

    def act(obs, noise):
        return noise.argmax(-1) if isinstance(env.actions, int) else noise

    batch = rollout(env, act, torch.tensor(values)[None, :, None], noise)
    seen = set()
    for i, value in enumerate(values):
        for k in range(2):
            actions = batch["actions"][0, i, k].numpy()
            if not isinstance(env.actions, int):
                low, high = np.array(env.actions, np.float32)
                actions = low + (actions.clip(-1, 1) + 1) / 2 * (high - low)
            seed = seed_of(noise["reset"][0, i, k, 0].item())
            length = int(batch["mask"][0, i, k].sum())
            obs, rewards, terminated, truncated = plain_loop(env_id, attribute, sign * value, seed, actions[:length])
            assert len(rewards) == length and (length == 250 or terminated or truncated)
            np.testing.assert_array_equal(batch["obs"][0, i, k, :length].numpy(), obs[:-1])
            np.testing.assert_array_equal(batch["rewards"][0, i, k, :length].numpy(), rewards)
            assert terminated == batch["terminated"][0, i, k]
            if not terminated:  # truncated, or the horizon: the critic is asked what the last observation is worth
                np.testing.assert_array_equal(batch["last_obs"][0, i, k].numpy(), obs[-1])
            seen.add((terminated, truncated))
    assert (False, True) in seen if name == "Pendulum-v1" else (True, False) in seen  # Pendulum ends after 200 steps


def test_gravity_beyond_what_the_constructor_asserts_works_and_matters():
    with pytest.raises(AssertionError):
        gymnasium.make("LunarLander-v3", gravity=-15.0)
    env = make("lunarlander", horizon=30)
    noise = noise_of(env, [0], 0, 1, 1)
    noise = {key: x.expand(-1, 3, *x.shape[2:]) for key, x in noise.items()}
    batch = rollout(
        env, lambda obs, noise: torch.zeros(3, 1, dtype=torch.long), torch.tensor([[[5.0], [10.0], [15.0]]]), noise
    )
    falling = batch["obs"][0, :, 0, 20, 3]
    assert falling[0] > falling[1] > falling[2]  # vertical speed after 20 steps of free fall


def test_actions_that_are_not_numbers_end_no_environment():
    """Box2D asserts, and the runs beside the one that exploded would end with it."""
    box = ((-1.0,) * 4, (1.0,) * 4)
    walker = Gymnasium("BipedalWalker-v3", ("hardcore",))
    env = replace(FAMILIES["lunarlander"], dynamics=walker, actions=box, horizon=5)
    noise, phi = noise_of(env, [0], 0, 2, 1), tasks_of(env, [0], 1, 2)
    batch = rollout(env, lambda obs, noise: torch.full_like(noise, math.nan), phi, noise)
    assert batch["mask"].all() and batch["rewards"].isfinite().all() and batch["actions"].isnan().all()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Pendulum-v1", {}, "names: say which parameter of Pendulum-v1 is φ, one of: .*g"),
        ("Pendulum-v1", {"names": ["g"]}, "bounds: give LOW HIGH for g of Pendulum-v1, e.g. 5 15"),
        (
            "Pendulum-v1",
            {"names": ["gravity"], "bounds": [5, 15]},
            "names gravity: Pendulum-v1 has no such number",
        ),
        ("Pendulum-v1", {"names": ["g", "l"], "bounds": [5, 15]}, "expected LOW HIGH for each of 2 parameter"),
        (
            "CartPole-v1",
            {"names": ["total_mass", "screen_width"], "bounds": [1, 2, 500, 700]},
            "names screen_width: .* gives the same episode .* at 500 and 700",
        ),
        (
            "CartPole-v1",
            {"names": ["masscart"], "bounds": [0.5, 2]},
            "names masscart: .* gives the same episode",
        ),
        (
            "Blackjack-v1",
            {"names": ["make.natural"], "bounds": [0, 1]},
            "a switch of Blackjack-v1, False",
        ),
        ("LunarLanderr-v3", {}, "did you mean LunarLander-v3?"),
        ("cartpole", {"names": ["gravity"]}, "names gravity: cartpole has its own φ; leave it out"),
    ],
)
def test_environments_that_cannot_be_used_are_refused_in_one_line(name, options, says):
    with pytest.raises(ValueError, match=says) as error:
        make(name, **options)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


def test_phi_observed_reaches_gymnasium_environments_and_a_component_without_a_range_is_zero():
    env = make("Pendulum-v1", ["g", "m"], [5, 15, 1, 1], 6)
    oracle = envs.with_phi_observed(env)
    assert oracle.is_gymnasium and oracle.obs_dim == 5
    phi = np.array([[[5.0, 1.0], [12.5, 1.0]]], np.float32)
    noise = {key: x.numpy() for key, x in noise_of(env, [0], 0, 2, 2).items()}
    plain, got = (envs.rollout(x, lambda obs, noise: noise, phi, noise) for x in (env, oracle))
    assert np.array_equal(plain["obs"], got["obs"][..., :3]) and np.array_equal(plain["rewards"], got["rewards"])
    assert (got["obs"][0, 0, ..., 3] == -1).all() and (got["obs"][0, 1, ..., 3] == 0.5).all()
    assert (got["obs"][..., 4] == 0).all() and got["obs"].dtype == np.float32


# --- lists of tasks ---


def test_whole_numbers_stay_whole_numbers():
    env = make("Room-v0", ["level"], values=[0, 1, 3])
    Room.seen = []
    assert rewards(env, [3], [1]) == pytest.approx([BASE + 30, BASE + 10], abs=1e-5)
    assert Room.seen == [3, 1] and all(type(x) is int for x in Room.seen)


def test_listed_tasks_are_drawn_equally_often_and_their_ends_are_phis():
    env = make("point", values=[0, 0.5, -0.25, 0.25, 0.5, -0.5])
    assert (env.low, env.high) == ((-0.25, -0.5), (0.5, 0.5))
    drawn = tasks_of(env, [1], 0, 9000)
    found, counts = drawn[0].unique(dim=0, return_counts=True)
    assert found.tolist() == [[-0.25, 0.25], [0.0, 0.5], [0.5, -0.5]] and (counts - 3000).abs().max() < 200
    assert envs.mean_task(env) == pytest.approx([0.25 / 3, 0.25 / 3])
    assert envs.held_out_tasks(env).tolist() == [[0, 0.5], [-0.25, 0.25], [0.5, -0.5]]
    assert envs.held_out_tasks(env, values=[0.1, 0.2]).tolist() == [pytest.approx([0.1, 0.2])]
    assert envs.scaled_phi(env, np.array([0.5, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("words", "medium"),
    [
        ("--param level --values 0 1 2", "mean"),  # their mean, 1, is one of them
        ("--param pull --values 0 1 4", None),  # 1.67 is none of them
        ("--param pull --values 0 1 2", "mean"),
        ("--param pull --values -1 1", None),  # forward and backward: 0 may be no task
        ("--param pull --values 0 1 4 --medium mean", "mean"),
        ("--param pull --values 0 1 4 --medium 4", [4.0]),
        ("--param level --values 0 1 3", None),  # 1.33 is no level
        ("--param make.size --values 3 4 7", None),
        ("--param make.depth level --values 0 1 1 2", None),
        ("--param level --values 0 1 3 --medium 1", [1.0]),
        ("--param level --values 0 1 3 --medium random", "random"),
        ("--param level --values 0 1 3 --medium pooled --tasks 5", "pooled"),
        ("--param level --values 0 1 2 --medium sampled", None),
        ("--param level --values 0 1 2 --medium median", None),
        ("--param pull --values 0 1 4 --medium sampled", "sampled"),
    ],
)
def test_the_medium_task_is_the_mean_of_listed_tasks_where_that_is_a_task(words, medium):
    args = parse(["--env", "Room-v0", "--algo", "directed-maml", *words.split()])
    env = make_env(args)
    if medium is None:
        with pytest.raises(run.RunError, match="--medium .* no task; give --medium one of them, random or pooled"):
            plan(args, "directed-maml", env)
        return
    [(_, settings)] = plan(args, "directed-maml", env)
    assert settings["medium"] == medium
    phi = envs.medium_task(env, medium, envs.sample_tasks(env, envs.stream([0], 0), 5), envs.stream([0], 1))
    if medium == "mean":
        assert phi.item() == pytest.approx(sum(args.values) / 3)
    if medium in ("random", "pooled"):
        assert set(phi.flatten().tolist()) <= set(args.values)


def test_a_run_on_listed_tasks_trains_is_reported_watched_and_repeated(tmp_path, capsys):
    words = ["--param", "level", "--values", 0, 1, 3, "--eval-values", 2, 3, "--medium", "random", "--oracle"]
    train(tmp_path, *words, env="Room-v0", algo="directed-fomaml", epochs=2)
    folder = tmp_path / "Room-v0-pg/directed-fomaml/delta0.005"
    config = json.loads((folder / "seed1/config.json").read_text())
    assert (config["values"], config["eval_values"], config["range"]) == ([0, 1, 3], [2, 3], [0, 3])
    held_out = [row for row in rows(folder / "seed1/eval.csv") if row["step"] == "0" and row["epoch"] == "2"]
    expected = {"2": 3 * (BASE + 20), "3": 3 * (BASE + 30)}
    assert {row["phi"]: float(row["return"]) for row in held_out} == pytest.approx(expected, abs=1e-3)
    (summary,) = rows(tmp_path / "Room-v0-pg/summary.csv")
    assert float(summary["held_out_inside_0"]) == pytest.approx(expected["3"], abs=1e-3)  # 2 lies between, and is new
    assert float(summary["held_out_outside_0"]) == pytest.approx(expected["2"], abs=1e-3)
    for seed, more, values in ((2, [], [0, 1, 3]), (3, ["--values", 1, 2], [1, 2]), (4, ["--range", 0, 0], None)):
        like = ["--like", folder / "seed1", "--seed", seed, "--medium", "random", *more, "--out", tmp_path, "--quiet"]
        like += ["--epochs", 1]
        run.main([*map(str, like)])
        again = json.loads((folder / f"seed{seed}/config.json").read_text())
        assert again["values"] == values and again["eval_values"] == [2, 3]
    policy = trained.load(folder / "seed1")
    assert policy.env.values == ((0,), (1,), (3,)) and policy.adapt(phi=[3]).act(np.zeros(6)) in (0, 1)
    with pytest.raises(SystemExit) as stop:
        run.main(["--watch", str(folder / "seed1")])
    said = capsys.readouterr()
    assert said.out.startswith("level = 0 | 3: after 2 equal random actions no observation differs; the rewards")
    assert stop.value.code == 1 and said.err.count("\n") == 1
    assert "--watch: Room-v0 cannot be rendered here (TypeError: " in said.err and "MUJOCO_GL" in said.err


def test_seeds_of_resets_are_odd_and_even_and_the_whole_range():
    u = envs.uniform(envs.stream([0], envs.TASKS, 0), 0, range(1), (4000,))
    seeds = [seed_of(x) for x in u.ravel().tolist()]
    assert {seed % 4 for seed in seeds} == {0, 1, 2, 3} and len(set(seeds)) > 3990
    assert min(seeds) < 10_000 and max(seeds) > 2**23 - 10_000
    assert (seed_of(0.5 / 2**23), seed_of(1 - 0.5 / 2**23)) == (0, 2**23 - 1)


def test_what_phi_changes_is_what_a_plain_loop_over_gymnasium_sees():
    """And so that a lander which falls upward is noticed: its vertical position and speed are observations 1 and 3."""
    env = make("lunarlander")
    noise = envs.draw_noise(env, envs.stream([0], envs.WATCH, 2), range(1), 1)
    seed, seen = seed_of(noise["reset"].item()), []
    noise = envs.draw_noise(envs.replace(env, horizon=6), envs.stream([0], envs.WATCH, 2), range(1), 1)
    for gravity in (-5.0, -15.0):
        lander = gymnasium.make("LunarLander-v3").unwrapped
        lander.gravity = gravity
        start = lander.reset(seed=seed)[0][3]
        steps = [lander.step(int(action)) for action in noise["action"][0, 0, 0].argmax(-1)[:5]]
        seen.append((start, steps[-1][0][3], sum(step[1] for step in steps)))
    (start_low, low, paid_low), (start_high, high, paid_high) = seen
    assert low > high
    said = watch.what_phi_changes(env)
    assert said.startswith("gravity (m/s²) = 5 | 15: after 5 equal random actions observation ")
    assert f"observation 3 went {start_low:.4g} → {low:.4g} | {start_high:.4g} → {high:.4g}" in said
    assert said.endswith(f"the rewards sum to {paid_low:.4g} | {paid_high:.4g}")


def test_an_environment_that_renders_nothing_is_one_line(tmp_path, capsys):
    class Blind(Room):
        def __init__(self, render_mode=None):
            super().__init__()

        def render(self):
            return None

    gymnasium.register("Blind-v0", Blind, max_episode_steps=3)
    train(tmp_path, "--param", "pull", "--range", 0, 1, env="Blind-v0", epochs=1)
    with pytest.raises(SystemExit):
        run.main(["--watch", str(tmp_path / "Blind-v0-pg/fomaml/seed1")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be rendered here (TypeError: render returns no picture)" in error


def test_held_out_tasks_at_which_the_environment_fails_are_refused_before_training(tmp_path, capsys):
    words = ["--param", "level", "--values", 0, 1, "--eval-values", 2, 9]
    assert "--eval-values: Room-v0 fails at level = 9 (IndexError" in refused(capsys, tmp_path, *words, env="Room-v0")
    words = ["--param", "model.opt.gravity[2]", "--range", -15, -5, "--eval-range", 5, 10]
    assert "--eval-range: model.opt.gravity[2] is -9.81" in refused(capsys, tmp_path, *words, env="Room-v0")


def test_a_worker_steps_its_own_trajectories_alone(pendulum):
    env, phi, noise = pendulum
    dynamics = env.dynamics.changed(own=slice(1, None, 2))
    envs.rollout(replace(env, dynamics=dynamics), watch.random_actions(env), phi, noise)
    assert list(dynamics.instances) == [1]


# --- what an environment reports at an episode's end ---


class Reporting(gymnasium.Env):
    """Reports that the goal lies ahead, the path so far, and, in half of its episodes, a time."""

    observation_space, action_space = spaces.Box(-9, 9, (1,), np.float32), spaces.Discrete(2)
    goal = 1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.timed = 0, seed % 2 == 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {"success": np.bool_(self.goal > 0), "path": self.goal * self.steps, "name": "x", "a,b": 1, 3: 3}
        info |= {"time": 7} if self.timed else {}
        return np.zeros(1, np.float32), self.goal + action, False, False, info


gymnasium.register("Reporting-v0", Reporting, max_episode_steps=5)
REPORTING = ["--param", "goal", "--range", -1, 1]


@pytest.mark.parametrize(
    ("value", "number"),
    [(True, 1), (np.bool_(False), 0), (3, 3), (np.float32(0.5), 0.5), (np.int64(-2), -2), (1e100, 1e100)]
    + [(x, math.nan) for x in (None, "1", math.nan, math.inf, 1e101, 10**400, 1j, [1], np.ones(1), {"a": 1})],
)
def test_numbers_and_switches_are_taken_of_an_info_and_nothing_else(value, number):
    assert trial.number_in({"x": value}, "x") == pytest.approx(number, nan_ok=True)
    assert math.isnan(trial.number_in({"x": value}, "y")) and math.isnan(trial.number_in(value, "x"))


def test_success_is_taken_by_itself_and_other_numbers_by_their_names():
    assert make("Room-v0", ["pull"], [0, 1]).dynamics.info == gyms.info_names(envs.ENVS["point"]) == ()
    assert make("Reporting-v0", ["goal"], [-1, 1]).dynamics.info == ("success",)
    env = make("Reporting-v0", ["goal"], [-1, 1], info=["path", "success", "path"])
    assert env.dynamics.info == ("success", "path")


def test_a_name_that_no_trial_episode_reports_is_warned_of_beside_those_that_it_reports(capsys):
    make("Reporting-v0", ["goal"], [-1, 1], info=["path", "pth"])
    make("Room-v0", ["pull"], [0, 1], info=["path"])
    assert capsys.readouterr().err.splitlines() == [
        "warning: Reporting-v0 reports no number pth in a trial episode, but path, success, time",
        "warning: Room-v0 reports no number path in a trial episode, but no number at all",
    ]


def test_what_an_environment_reports_stands_beside_the_returns_whoever_steps_it(tmp_path):
    """Episodes of 5 steps, or of 3 by the horizon, have a path of 5 or 3 goals; no episode without a time counts."""
    for name, words in (("plain", []), ("here", ["--info", "path", "time"]), ("workers", ["--workers", 3])):
        words = ["--info", "path", "time", *words] if name == "workers" else words
        train(tmp_path / name, *REPORTING, *words, env="Reporting-v0")
    path = "Reporting-v0-pg/fomaml/seed1"
    plain, here, workers = (rows(tmp_path / name / path / "eval.csv") for name in ("plain", "here", "workers"))
    assert here == workers and list(here[0]) == ["epoch", "phi", "step", "return", "success", "path", "time"]
    assert [{key: row[key] for key in plain[0]} for row in here] == plain and "path" not in plain[0]
    for row in here:
        assert float(row["success"]) == (float(row["phi"]) > 0)
        assert float(row["path"]) == pytest.approx(5 * float(row["phi"]))
    assert {row["time"] for row in here} == {"7", ""}
    assert rows(tmp_path / "plain" / path / "log.csv") == rows(tmp_path / "here" / path / "log.csv")
    thetas = [torch.load(tmp_path / name / path / "checkpoint.pt")["theta"] for name in ("plain", "workers")]
    assert all(torch.equal(p, thetas[1][name]) for name, p in thetas[0].items())
    train(tmp_path / "short", *REPORTING, "--info", "path", "--horizon", 3, env="Reporting-v0")
    for row in rows(tmp_path / "short" / path / "eval.csv"):
        assert float(row["path"]) == pytest.approx(3 * float(row["phi"]))
    (summary,) = rows(tmp_path / "here/Reporting-v0-pg/summary.csv")
    assert float(summary["held_out_inside_1_success"]) == 0.5  # half of an even grid over Φ lies ahead


def test_a_column_of_an_earlier_command_stays_and_a_new_one_is_empty_before(tmp_path):
    for epochs, words in ((2, []), (4, ["--info", "path"]), (6, ["--info", "time"])):
        train(tmp_path, *REPORTING, *words, "--resume", env="Reporting-v0", epochs=epochs)
    found = rows(tmp_path / "Reporting-v0-pg/fomaml/seed1/eval.csv")
    assert list(found[0])[4:] == ["success", "path", "time"]
    filled = {(row["epoch"], name) for row in found for name in ("success", "path", "time") if row[name]}
    assert filled == {*((epoch, "success") for epoch in "246"), ("4", "path"), ("6", "time")}


def test_a_run_from_before_its_environment_was_asked_goes_on_with_what_it_reports(tmp_path):
    folder = tmp_path / "Reporting-v0-pg/fomaml/seed1"
    train(tmp_path, *REPORTING, env="Reporting-v0", epochs=2)
    state = torch.load(folder / "checkpoint.pt")
    del state["info"]
    state["eval"] = [row[:4] for row in state["eval"]]
    (folder / "checkpoint.pt").write_bytes(checkpoints.packed(state))
    train(tmp_path, *REPORTING, "--resume", env="Reporting-v0")
    assert {(row["epoch"], row["success"]) for row in rows(folder / "eval.csv")} == {("2", ""), ("4", "0"), ("4", "1")}


# --- what an environment returns ---


class Odd(gymnasium.Env):
    """Pays `pull` for every step; its subclasses return something else than gymnasium's interface says."""

    observation_space, action_space = spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(2)
    pull, seen = 1.0, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        Odd.seen.append(action)
        self.steps += 1
        return np.zeros(2, np.float32), self.pull, False, False, {}


def odd(step=None, reset=None, steps=3, **attributes):
    """The id of an Odd environment with other methods or attributes.

    step, reset: (env, what Odd returns) -> what this one returns.
    """
    methods = {} if step is None else {"step": lambda self, action: step(self, Odd.step(self, action))}
    methods |= {} if reset is None else {"reset": lambda self, **options: reset(self, Odd.reset(self, **options))}
    env_id = f"Odd{len(gymnasium.registry)}-v0"
    gymnasium.register(env_id, type("Another", (Odd,), methods | attributes), max_episode_steps=steps)
    return env_id


def with_reward(make_reward):
    return lambda self, returned: (returned[0], make_reward(self), *returned[2:])


def with_observation(make_observation):
    return lambda self, returned: (make_observation(self), *returned[1:])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step": with_reward(lambda env: np.ones(2))}, r"its reward is array.*, of shape \(2,\); expected one number"),
        ({"step": with_reward(lambda env: None)}, "its reward is None, of shape"),
        ({"step": lambda env, returned: returned[:4]}, "expected .observation, reward, terminated, truncated, info."),
        ({"step": with_observation(lambda env: np.zeros(3))}, r"shape \(3,\), its observation_space \(2,\)"),
        ({"reset": lambda env, returned: (np.zeros(3), {})}, r"shape \(3,\), its observation_space \(2,\)"),
        ({"reset": lambda env, returned: np.zeros(2)}, "its reset returns no pair; expected .observation, info."),
    ],
)
def test_an_environment_that_returns_something_else_is_refused_in_words(options, says):
    if options.get("step") and says.startswith("expected"):  # gymnasium's own time limit would fail first
        options = options | {"steps": None}
    with pytest.raises(ArgumentError, match=says) as error:
        make(odd(**options), ["pull"], [0, 1], horizon=3)
    assert error.value.argument == "name" and error.value.value.startswith("Odd")


@pytest.mark.parametrize("reward", [lambda env: np.array([env.pull]), lambda env: np.float32(env.pull)])
def test_a_reward_in_an_array_of_one_number_is_that_number(reward):
    env = make(odd(with_reward(reward)), ["pull"], [0, 1])
    assert rewards(env, [0.25], [0.5]) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (with_reward(lambda env: np.log(env.pull)), "fails at pull = 0 .ValueError: its reward is -inf"),
        (with_observation(lambda env: np.full(2, np.nan)), "fails at pull = 0 .ValueError: its observation is not"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_numbers_that_are_not_finite_are_the_environments(tmp_path, capsys, step, says):
    error = refused(capsys, tmp_path, "--param", "pull", "--range", 0, 1, env=odd(step))
    assert re.search(f"--range: Odd.* {says}", error)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reward_that_is_not_finite_in_training_is_not_blamed_on_step_sizes(tmp_path, capsys, workers):
    """Nor is --resume offered, which would end the same way."""
    env = odd(with_reward(lambda env: np.nan if env.steps > 300 else env.pull), steps=400)
    words = ["--param", "pull", "--range", 0, 1, "--horizon", 400, "--workers", workers]
    error = refused(capsys, tmp_path, *words, env=env, code=1)
    assert f"{env} returned rewards that are not finite" in error and "--resume" not in error and "--beta" not in error


def leaving(where, end):
    """The id of an environment that calls `end`: in "make", "reset" or "step"; "late": only after
    what is tried before training."""

    def leave(env, returned):
        if where != "late" or env.steps > 300:
            end()
        return returned

    if where == "make":
        return odd(__init__=lambda env: end())
    return odd(**{"reset" if where == "reset" else "step": leave}, steps=400)


ENDS = {"sys.exit": lambda: sys.exit(0), "os._exit": lambda: os._exit(0)}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("where", "workers"), [("make", 1), ("reset", 1), ("step", 1), ("late", 1), ("late", 2)])
def test_an_environment_that_exits_is_an_error(tmp_path, start, where, workers, end):
    words = ["--algo", "fomaml", "--param", "pull", "--range", 0, 1, "--horizon", 400]
    words += ["--env", leaving(where, ENDS[end]), "--workers", workers]
    code, lines = start(*words, out=tmp_path).wait()
    assert code == 1 and len(lines) == 1
    place = f"SystemExit: 0 (test_gyms.py, line {ENDS[end].__code__.co_firstlineno})"
    assert place in lines[0] or (workers, end) == (2, "os._exit") and "worker died" in lines[0]
    assert where == "late" or not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)"])
def test_a_module_that_exits_when_it_is_imported_is_an_error(tmp_path, start, monkeypatch, end):
    (tmp_path / "exiting.py").write_text(f"import os, sys; {end}")
    monkeypatch.syspath_prepend(tmp_path)
    command = start("--env", "exiting:X-v0", "--algo", "maml", out=tmp_path / "out")
    says = "the environment's code called exit: SystemExit: 0 (exiting.py, line 1); take that out"
    assert command.wait() == (1, [f"run.py: {says}"])


def test_a_process_that_an_environment_forks_may_end_by_itself(tmp_path, start):
    def fork(env, returned):
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        return returned

    words = ["--algo", "fomaml", "--param", "pull", "--range", 0, 1, "--epochs", 1]
    assert start(*words, "--env", odd(reset=fork), out=tmp_path).wait() == (0, [])


@pytest.mark.parametrize("workers", [1, 2])
def test_debug_shows_the_traceback_of_the_environment_also_from_a_worker(tmp_path, capsys, workers):
    def fail(env, returned):
        assert env.steps < 300
        return returned

    words = ["--param", "pull", "--range", 0, 1, "--horizon", 400, "--workers", workers]
    env = odd(fail, steps=400)
    error = refused(capsys, tmp_path, *words, env=env, code=1)
    with pytest.raises(SystemExit):
        train(tmp_path, *words, "--overwrite", "--debug", env=env)
    traced = capsys.readouterr().err
    assert "Traceback" not in error and traced.endswith(error)
    assert "assert env.steps < 300" in traced and "test_gyms.py" in traced


def test_what_an_environment_says_may_hold_backquotes_and_comes_with_its_file_and_line(tmp_path, capsys, monkeypatch):
    def fail(env, returned):
        raise ValueError("`speed` must be set")

    error = refused(capsys, tmp_path, "--param", "pull", "--range", 0, 1, env=odd(fail))
    line = fail.__code__.co_firstlineno + 1
    assert f"fails at pull = 0 (ValueError: `speed` must be set (test_gyms.py, line {line})); give others" in error
    (tmp_path / "registering.py").write_text("import gymnasium; gymnasium.register('Registered-v0', dict)")
    monkeypatch.syspath_prepend(tmp_path)
    error = refused(capsys, tmp_path, env="registering:Registred-v0")
    assert "--env registering:Registred-v0: gymnasium cannot make it: NameNotFound: Environment `Registred`" in error


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_box_of_whole_numbers_gets_whole_numbers(dtype):
    env = make(odd(action_space=spaces.Box(-2, 3, (2,), dtype)), ["pull"], [0, 1])
    noise = envs.draw_noise(env, envs.stream([0], 0), range(1), 1)
    Odd.seen = []
    envs.rollout(env, lambda obs, noise: np.array([[[0.5, -7.0]]]), np.array([[[1.0]]]), noise)
    assert all(action.dtype == dtype and action.tolist() == [2, -2] for action in Odd.seen)  # 1.75 of −2 .. 3


def test_discrete_actions_may_begin_elsewhere(tmp_path):
    env_id = odd(action_space=spaces.Discrete(2, start=5))
    train(tmp_path, "--param", "pull", "--range", 0, 1, env=env_id, epochs=1)
    Odd.seen = []
    policy = trained.load(tmp_path / f"{env_id}-pg/fomaml/seed1")
    trajectories = policy.sample(policy.check_phi([0.5]), envs.stream([0], 0), itertools.count(1), policy.theta)
    actions = trajectories["actions"][0, 0]
    assert set(Odd.seen) == {5, 6} == {policy.act(np.zeros(2)) for _ in range(50)}
    own = [(np.zeros((3, 2)), taken[:3], np.zeros(3)) for taken in actions + 5]
    got = policy.trajectories(own)["actions"][0, 0]
    assert set(actions[:, :3].unique().tolist()) == {0, 1} and torch.equal(got, actions[:, :3])


UNUSUAL_ACTIONS = [
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary(3),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(-1, 1, (2, 3), np.float32),
]


@pytest.mark.parametrize("space", UNUSUAL_ACTIONS, ids=str)
def test_other_actions_are_refused_with_the_line_that_makes_them_work(space):
    def acts(env, returned):
        assert env.action_space.contains(np.asarray(Odd.seen[-1], env.action_space.dtype))
        return returned

    env_id = odd(acts, action_space=space)
    with pytest.raises(ArgumentError, match="expected Discrete, or a bounded Box vector; register") as error:
        make(env_id, ["pull"], [0, 1])
    line = str(error.value).split("register an environment that is ")[1]
    wrapped = f"Wrapped-{env_id}"
    gymnasium.register(wrapped, lambda: eval(line, {"env": gymnasium.make(env_id), "gymnasium": gymnasium, "np": np}))
    assert rewards(make(wrapped, ["pull"], [0, 1], horizon=3), [0.25]) == [0.25]


# --- environments with a state or random numbers of their own ---


def resets_counted(env, returned):
    env.resets = getattr(env, "resets", 0) + 1
    return returned


EXACT = with_reward(lambda env: env.pull)
OWN = {
    "a count of resets": {"reset": resets_counted, "step": with_reward(lambda env: env.pull + env.resets)},
    "numpy's random numbers": {"step": with_reward(lambda env: env.pull + np.random.rand())},
    "Python's": {"step": with_reward(lambda env: env.pull + random.random())},
}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_an_environment_that_cannot_repeat_a_task_is_warned_of(capsys, options):
    make(env_id := odd(**options), ["pull"], [0, 1])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {env_id} plays a task otherwise the second time") and said.count("\n") == 1
    make(odd(EXACT), ["pull"], [0, 1])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_what_changes_by_itself_is_not_the_parameters_doing(options):
    with pytest.raises(ArgumentError, match="names nothing: .* gives the same episode under random actions at 0 and 1"):
        make(odd(**options, nothing=0.5), ["nothing"], [0, 1])


def test_a_normalised_observation_is_a_state_of_its_own(capsys):
    env_id = odd(with_observation(lambda env: np.full(2, env.steps * env.pull)))
    normalised = f"Normalised-{env_id}"
    gymnasium.register(normalised, lambda: gymnasium.wrappers.NormalizeObservation(gymnasium.make(env_id)))
    make(normalised, ["pull"], [0.5, 1])
    assert f"{normalised} plays a task otherwise the second time" in capsys.readouterr().err


# --- what is tried respects the horizon ---


def test_no_more_steps_are_tried_than_an_episode_has():
    def fails_late(env, returned):
        assert env.steps < 5
        return returned

    assert make(odd(fails_late, steps=100), ["pull"], [0, 1], horizon=4).horizon == 4
    with pytest.raises(ArgumentError, match="fails at pull = 0 .AssertionError"):
        make(odd(fails_late, steps=100), ["pull"], [0, 1], horizon=6)
    late = odd(with_reward(lambda env: env.pull if env.steps > 4 else 0.0), steps=100)
    assert make(late, ["pull"], [0, 1], horizon=6).horizon == 6
    with pytest.raises(ArgumentError, match="names pull: .* same episode"):
        make(late, ["pull"], [0, 1], horizon=4)


class Sized(Odd):
    """size has no default; unused has one."""

    def __init__(self, size, unused=1.0):
        self.pull = float(size)
        assert type(size) is int and size > 0


gymnasium.register("Sized-v0", Sized, max_episode_steps=3)


def test_a_keyword_that_the_constructor_requires_may_be_the_parameter():
    env = make("Sized-v0", ["make.size"], values=[1, 2, 5])
    assert rewards(env, [5], [1]) == [5, 1] and env.dynamics.whole == ["make.size"]
    assert rewards(pickle.loads(pickle.dumps(env)), [2]) == [2]


def test_a_keyword_that_changes_nothing_is_refused_like_an_attribute():
    with pytest.raises(ArgumentError, match="names make.unused: .* same episode"):
        make("Sized-v0", ["make.unused"], [1, 2], keywords=["size=1"])
    with pytest.raises(ArgumentError, match="names make.wind_power: .* with what that needs"):
        make("LunarLander-v3", ["make.wind_power"], [5, 15])


def test_a_gravity_whose_sign_changes_is_warned_of(capsys):
    make("LunarLander-v3", ["gravity"], values=[-5, 5])
    assert capsys.readouterr().err == "warning: gravity is -10 in LunarLander-v3, and 5 points upward\n"


# --- keywords for the constructor ---


def test_keywords_reach_every_instance_and_are_part_of_the_run(tmp_path, capsys):
    words = ["--param", "wind_power", "--range", 5, 15, "--make", "enable_wind=True", "--horizon", 5]
    train(tmp_path, *words, env="LunarLander-v3", epochs=1)
    folder = tmp_path / "LunarLander-v3-pg/fomaml/seed1"
    assert json.loads((folder / "config.json").read_text())["make"] == ["enable_wind=True"]
    assert trained.load(folder).env.dynamics.keywords == {"enable_wind": True}
    run.main(["--like", str(folder), "--seed", "2", "--epochs", "1", "--out", str(tmp_path), "--quiet"])
    assert trained.load(folder.with_name("seed2")).env.dynamics.keywords == {"enable_wind": True}
    words[words.index("enable_wind=True")] = "enable_wind=1"
    assert "give --make as before" in refused(capsys, tmp_path, *words, "--resume", env="LunarLander-v3", epochs=2)
    assert make("lunarlander", keywords=["enable_wind=True"]).dynamics.keywords == {"enable_wind": True}


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("Sized-v0", ["size"], "make size: expected NAME=VALUE"),
        ("Sized-v0", ["size=2", "unsued=1"], "make unsued=1: Sized-v0 has no such keyword; did you mean unused?"),
        ("Sized-v0", ["size=2", "unused=1"], "make unused=1: it is φ; leave it out"),
        ("Sized-v0", [], "Sized-v0: gymnasium cannot make it: TypeError: .* argument: 'size'"),
        ("lunarlander", ["windy=1"], "make windy=1: LunarLander-v3 has no such keyword"),
        ("cartpole", ["x=1"], "make x=1: cartpole has no constructor; leave it out"),
    ],
)
def test_keywords_that_the_constructor_does_not_take_are_refused(name, words, says):
    with pytest.raises(ArgumentError, match=says):
        make(name, ["make.unused"] if name == "Sized-v0" else None, [1, 2], keywords=words)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("0.5", 0.5), ("True", True), ("None", None), ("4x4", "4x4")])
def test_values_of_keywords_are_pythons_numbers_or_words(text, value):
    name, got = gyms.keyword_of(f"x={text}")
    assert name == "x" and got == value and type(got) is type(value)
