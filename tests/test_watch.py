"""--watch: the GIF of an episode, who draws it, and what it says that φ changes."""

import os
from dataclasses import replace

import numpy as np
import pytest

import envs
import run
from harness import gyms, load, watch
from tests.commands import train
from tests.test_trained import CARTPOLE, PENDULUM, VELOCITY


def frames_of(path):
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as animation:
        return animation.n_frames


@pytest.mark.parametrize(
    ("folder", "phi", "name"),
    [(CARTPOLE, [12], "watch-12.gif"), (VELOCITY, [], "watch-1.gif"), (PENDULUM, [], "watch-10.gif")],
)
def test_a_run_is_watched_after_adaptation_on_the_mean_task_by_default(small, capsys, folder, phi, name):
    run.main(["--watch", str(small / folder), *(["--phi", *map(str, phi)] if phi else [])])
    out = capsys.readouterr().out
    assert str(small / folder / name) in out and frames_of(small / folder / name) > 3


def test_an_animation_plays_at_the_environments_own_speed(small):
    """CartPole's gymnasium renders 50 frames a second, Pendulum's 30, which a GIF rounds; a step of ours is 0.1 s."""
    policies = [load(small / folder) for folder in (CARTPOLE, PENDULUM, VELOCITY)]
    assert [watch.milliseconds(policy.settings["env"], policy.env) for policy in policies] == [20, 30, 100]
    watch.watch(small / VELOCITY, [1.5])
    image = pytest.importorskip("PIL.Image")
    with image.open(small / VELOCITY / "watch-1.5.gif") as animation:
        times = [animation.seek(i) or animation.info["duration"] for i in range(animation.n_frames)]
    assert sum(times) == 100 * 6  # 5 steps and the start


def test_the_axes_of_all_pictures_are_those_of_the_whole_episode(monkeypatch):
    """A velocity that grows to 9, and a legend outside of the axes."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    obs = 3 * np.arange(3.0).reshape(1, 1, 1, 3, 1)
    episode = {"obs": obs, "mask": np.ones((1, 1, 1, 3), bool), "last_obs": np.full((1, 1, 1, 1), 9.0)}
    assert len(watch.draw_frames(watch.draw_velocity, np.array([[[1.0]]]), episode)) == len(figures) - 1 == 4
    for figure in figures:
        [axes], [legend] = figure.axes, figure.legends
        (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
        assert low <= 0 < 9 <= high and left <= 0 < 3 <= right and (low, high) == figures[0].axes[0].get_ylim()
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("name", watch.DRAWN)
def test_the_other_families_draw_themselves(name):
    env = envs.ENVS[name]
    obs = np.linspace(-1, 1, 2 * env.obs_dim).reshape(1, 1, 1, 2, env.obs_dim)
    episode = {"obs": obs, "mask": np.ones((1, 1, 1, 2), bool), "last_obs": obs[:, :, :, 1]}
    first, *_, last = watch.frames(name, env, np.array(env.high), None, episode)
    assert first.shape == last.shape and (first != last).any()


def test_a_family_that_draws_nothing_shows_its_observations_against_time(tmp_path, monkeypatch):
    """A point in space: three observations, as no family of ours has."""
    space = replace(
        envs.ENVS["point"], phi_names=("x", "y", "z"), low=(-0.5,) * 3, high=(0.5,) * 3, obs_dim=3, reset_noise=3,
        actions=((-0.1,) * 3, (0.1,) * 3),
    )  # fmt: skip
    monkeypatch.setitem(gyms.FAMILIES, "space", space)
    train(tmp_path, "--horizon", 2, env="space", epochs=1)
    folder = tmp_path / "space-pg/fomaml/seed1"
    assert "2 steps, return " in watch.watch(folder, [0.1, 0.2, 0.3])
    assert frames_of(folder / "watch-0.1_0.2_0.3.gif") == 3


@pytest.mark.parametrize("words", [["--phi", "1", "2"], ["--phi", "9", "9", "9"]])
def test_a_task_of_another_shape_is_refused_in_one_line(small, capsys, words):
    with pytest.raises(SystemExit) as stop:
        run.main(["--watch", str(small / CARTPOLE), *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"{' '.join(words)}: expected 1 number(s): gravity" in error


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_a_link_in_an_untrusted_folder_is_replaced_by_the_animation_and_not_followed(small, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((small / CARTPOLE / "checkpoint.pt").read_bytes())
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("watch-10.gif", "watch-10.gif.tmp"):
        (tmp_path / name).symlink_to(outside)
    watch.watch(tmp_path)
    assert outside.read_text() == "mine" and frames_of(tmp_path / "watch-10.gif") > 3
