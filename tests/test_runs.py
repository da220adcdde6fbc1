"""Run folders written by hand: how they are read, which lines they make, and what is left out."""

import json
import math
import os
import shutil

import numpy as np
import pytest

from harness import runs
from harness.settings import ALL_SETTINGS
from maml import LEARNERS

GRAVITY, GOAL = ("gravity (m/s²)",), ("goal x (m)", "goal y (m)")
TASKS = {GRAVITY: ["5", "10", "15"], GOAL: ["-1 0", "0 0", "0 1", "0 -1", "1 0"]}


def write_run(folder, algo, returns, phi=GRAVITY, seconds=0.5, failed=False, **settings):
    """A run with these returns after adaptation, at the defaults of the algorithm but for `settings`. It
    takes 100 env steps an epoch, and returns 10, 11, 12 on held-out tasks after 0, 1, 2 inner steps."""
    folder.mkdir(parents=True)
    config = {"env": "toy", "rl": "pg", "algo": algo, "seed": int(folder.name.removeprefix("seed"))}
    config |= {"beta": 1 if algo.endswith("reptile") else 0.001, "inner_steps": 1, "eval_steps": 2}
    config |= {"delta": 0.005 if algo.startswith("directed-") else None, "threshold": 15.0}
    config |= {"phi_names": phi, "range": [5.0, 15.0] if phi == GRAVITY else [-1.0, 1.0] * 2}
    (folder / "config.json").write_text(json.dumps(config | settings))
    rows = ["epoch,env_steps,seconds,sample_seconds,return_pre,return_post,return_med"]
    for i, x in enumerate(returns, 1):
        rows.append(f"{i},{100 * i},{seconds * i},{0.1 * i},{x - 1},{x},")
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    steps = (config | settings)["eval_steps"] + 1
    rows = [f"{len(returns)},{task},{step},{10 + step}" for task in TASKS[phi] for step in range(steps)]
    write_evaluation(folder, rows if returns else [])
    if failed:
        (folder / "failed.txt").write_text("not finite\n")


def write_evaluation(folder, rows):
    (folder / "eval.csv").write_text("\n".join(["epoch,phi,step,return", *rows]) + "\n")


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def labels_of(*runs_of_a_folder, root):
    """The labels of runs, each (algo, {setting: value})."""
    for i, (algo, settings) in enumerate(runs_of_a_folder):
        write_run(root / f"run{i}" / "seed1", algo, [1.0] * 3, **settings)
    labels, left_out = runs.read(root)
    assert left_out == []
    return list(labels)


# --- lines: runs that differ in nothing but their seeds ---


def test_runs_that_differ_in_a_setting_are_lines_of_their_own_in_its_order(tmp_path):
    labels = labels_of(*(("maml", {"threshold": x}) for x in (15, 3.0)), root=tmp_path / "a")
    assert labels == ["maml, threshold = 3", "maml, threshold = 15"]
    sizes = [{"alpha": alpha, "hidden": [64, 64]} for alpha in (0.1, 0.001, 0.01)]
    sizes.append({"alpha": 0.1, "hidden": [8]})
    labels = labels_of(*(("maml", x) for x in sizes), root=tmp_path / "b")
    assert labels == [
        "maml, hidden = 8, α = 0.1", "maml, hidden = 64 64, α = 0.001",
        "maml, hidden = 64 64, α = 0.01", "maml, hidden = 64 64, α = 0.1",
    ]  # fmt: skip


def test_each_algorithm_may_have_defaults_of_its_own(tmp_path):
    """Reptile's are β = 1 and 5 inner steps, MAML++'s 2; the others' 0.001 and 1."""
    own = {"maml": 1, "reptile": 5, "maml++": 2}
    learners = [(algo, {"inner_steps": steps}) for algo, steps in own.items()]
    assert labels_of(*learners, root=tmp_path / "a") == ["maml", "reptile", "maml++"]
    learners[0] = ("maml", {"inner_steps": 2})
    expected = ["maml, inner_steps = 2", "reptile, inner_steps = 5", "maml++, inner_steps = 2"]
    assert labels_of(*learners, root=tmp_path / "b") == expected


def test_a_setting_is_shown_though_one_algorithm_alone_has_it(tmp_path):
    promp = {"outer_steps": 5, "clip": 0.3}
    plain = {"outer_steps": 1, "clip": None}
    labels = labels_of(("fomaml", promp), ("directed-fomaml", plain), root=tmp_path)
    assert labels == ["fomaml, outer_steps = 5, ε = 0.3", "directed-fomaml, outer_steps = 1"]


def test_lines_that_were_evaluated_otherwise_are_marked(tmp_path):
    evaluated = {"eval_alpha": 0.1, "eval_range": [0, 20]}
    labels = labels_of(("fomaml", evaluated), ("directed-fomaml", {}), root=tmp_path)
    assert labels == ["fomaml, eval_alpha = 0.1, eval_range = 0 20", "directed-fomaml"]


def test_what_all_lines_share_names_none(tmp_path):
    shared = {"tasks": 20, "oracle": True, "rl": "ac"}
    labels = labels_of(("maml", shared), ("directed-maml", shared | {"medium": "mean"}), root=tmp_path)
    assert labels == ["maml", "directed-maml"]


def test_what_follows_from_other_settings_names_no_line(tmp_path):
    """α's own β is α β, iMAML's λ is 1 / α, and a run without inner steps is evaluated with the default α."""
    for algo in ("meta-sgd", "imaml"):
        follows = [{"alpha": x, "beta_alpha": x * 0.001, "lambda_": 1 / x} for x in (0.01, 0.001)]
        labels = labels_of(*((algo, x) for x in follows), root=tmp_path / algo)
        assert labels == [f"{algo}, α = 0.001", f"{algo}, α = 0.01"]
    lambdas = {"lambda_": 100, "alpha": 0.01}, {"lambda_": 5, "alpha": 0.01}
    labels = labels_of(*(("imaml", x) for x in lambdas), root=tmp_path / "b")
    assert labels == ["imaml, λ = 5", "imaml, λ = 100"]
    joint = {"inner_steps": 0, "alpha": None, "eval_alpha": ALL_SETTINGS["alpha"].default}
    labels = labels_of(("maml", joint), ("fomaml", joint | {"eval_alpha": None}), root=tmp_path / "c")
    assert labels == ["maml", "fomaml"]


def test_a_run_from_before_a_setting_existed_has_its_default(tmp_path):
    """And so have those of a family: the horizon of point is 20."""
    for seed, settings in ((1, {}), (2, {"horizon": 20, "gamma": 0.99, "oracle": False, "clip": None})):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0], env="point", **settings)
    write_run(tmp_path / "other" / "seed1", "maml", [1.0], env="point", gamma=0.9)
    labels, _ = runs.read(tmp_path)
    assert {label: len(line) for label, line in labels.items()} == {"maml, γ = 0.9": 1, "maml, γ = 0.99": 2}


def test_what_does_not_make_a_run_that_run_parts_no_line(tmp_path):
    names = ["epochs", "eval_every", "device", "versions", "runs_in_batch", "out"]
    for seed in (1, 2):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0], **dict.fromkeys(names, seed))
    assert len(runs.read(tmp_path)[0]["maml"]) == 2


def test_numbers_written_as_1_and_1_0_are_the_same_and_close_ones_are_not(tmp_path):
    for seed, beta in ((1, 1), (2, 1.0)):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0], beta=beta)
    write_run(tmp_path / "other" / "seed1", "maml", [1.0], beta=1 + 1e-9)
    assert [len(line) for line in runs.read(tmp_path)[0].values()] == [2, 1]


def test_an_algorithm_that_is_not_in_the_table_stands_after_those_that_are(tmp_path):
    labels = labels_of(*((algo, {}) for algo in ("directed-a-maml", "a-maml", *LEARNERS)), root=tmp_path)
    assert labels == [*LEARNERS, "a-maml", "directed-a-maml"]


def test_a_long_value_is_cut(tmp_path):
    values = {"values": list(range(1000, 2000))}
    [_, label] = labels_of(("maml", values), ("maml", {"values": None}), root=tmp_path)
    assert label.startswith("maml, values = 1000 1001 ") and len(label) < 100


def found_counterparts(root):
    labels, _ = runs.read(root)
    return {label: runs.counterpart(line[0], labels) for label, line in labels.items()}


def test_a_counterpart_differs_in_the_delta_step_alone(tmp_path):
    step = {"medium": "random", "delta_schedule": "decay", "delta": 0.1}
    for alpha in (0.1, 0.2):
        write_run(tmp_path / f"{alpha}" / "seed1", "maml", [1.0], alpha=alpha)
        write_run(tmp_path / f"directed-{alpha}" / "seed1", "directed-maml", [1.0], alpha=alpha, **step)
    write_run(tmp_path / "no-undirected" / "seed1", "directed-maml", [1.0], alpha=0.3, **step)
    found = found_counterparts(tmp_path)
    directed = "directed-maml, medium = random, α = {}, δ = 0.1, delta_schedule = decay"
    assert [found[directed.format(alpha)] for alpha in (0.1, 0.2, 0.3)] == ["maml, α = 0.1", "maml, α = 0.2", ""]
    assert found["maml, α = 0.1"] == found["maml, α = 0.2"] == ""


def test_without_an_undirected_counterpart_the_line_with_delta_0_is_it(tmp_path):
    for delta in (0, 0.1):
        write_run(tmp_path / f"{delta}" / "seed1", "directed-maml", [1.0], delta=delta)
    zero, other = "directed-maml, δ = 0", "directed-maml, δ = 0.1"
    assert found_counterparts(tmp_path) == {zero: "", other: zero}


# --- reading ---


def test_of_an_evaluation_that_is_written_just_now_the_one_before_counts(tmp_path):
    write_run(tmp_path / "seed1", "maml", [1.0, 2.0, 3.0])
    whole = [(task, step) for task in (5, 10) for step in range(3)]
    rows = [f"1,{task},{step},9" for task, step in whole]
    rows += [f"2,{task},{step},{step}" for task, step in whole]
    rows += [f"3,{task},{step},9" for task, step in whole[:4]]
    write_evaluation(tmp_path / "seed1", rows)
    [[run]] = runs.read(tmp_path)[0].values()
    assert run.evaluation["epoch"] == 2
    np.testing.assert_array_equal(run.evaluation["phi"], [[5], [10]])
    np.testing.assert_array_equal(run.evaluation["returns"], [[0, 0], [1, 1], [2, 2]])


def test_a_run_that_stopped_inside_its_first_evaluation_has_none(tmp_path):
    write_run(tmp_path / "seed1", "maml", [1.0])
    write_evaluation(tmp_path / "seed1", ["1,5,0,1", "1,5,1,1", "1,5,2,1", "1,10,0,1"])
    labels, left_out = runs.read(tmp_path)
    assert labels["maml"][0].evaluation is None and left_out == []


def test_half_a_row_at_the_end_of_a_file_is_no_damage(tmp_path):
    """Another command may be writing it just now."""
    write_run(tmp_path / "seed1", "maml", [1.0, 2.0])
    for name in ("log.csv", "eval.csv"):
        with open(tmp_path / "seed1" / name, "a") as file:
            file.write("3,9")
    labels, left_out = runs.read(tmp_path)
    assert left_out == [] and len(labels["maml"][0].log["epoch"]) == 2


def test_a_run_that_just_begins_is_no_line_and_an_emptied_log_is_said(tmp_path):
    write_run(tmp_path / "seed1", "maml", [])
    assert runs.read(tmp_path) == ({}, [])
    (tmp_path / "seed1/checkpoint.pt").touch()
    [line] = runs.read(tmp_path)[1]
    assert line.startswith(f"{tmp_path / 'seed1/log.csv'}: holds no epochs, though there is a checkpoint.pt")


# --- what is left out ---


def test_a_run_of_an_earlier_version_is_left_out_in_one_line_that_says_so(tmp_path):
    """Its config.json has low, high and phi."""
    path = tmp_path / "seed1/config.json"
    write_run(path.parent, "fomaml", [1.0])
    config = json.loads(path.read_text())
    config |= {"low": config.pop("range")[:1], "high": [15.0], "phi": config.pop("phi_names")}
    path.write_text(json.dumps(config))
    [line] = runs.read(tmp_path)[1]
    assert line.startswith(f"{path}: cannot be read (ValueError: written by an earlier version of this code;")


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    write_run(tmp_path / "a" / "seed1", "maml", [1.0])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    labels, [line] = runs.read(tmp_path)
    assert len(labels["maml"]) == 1
    assert line.startswith(f"{tmp_path / 'b/seed1'}: the same settings and seed as {tmp_path / 'a/seed1'};")


def test_a_run_on_other_tasks_than_most_is_left_out_wherever_it_stands(tmp_path):
    for i, phi in enumerate((GOAL, GRAVITY, GRAVITY), 1):
        write_run(tmp_path / f"seed{i}", "maml", [1.0], phi)
    labels, [line] = runs.read(tmp_path)
    assert [run.config["seed"] for run in labels["maml"]] == [2, 3]
    assert line.startswith(f"{tmp_path / 'seed1'}: its φ is goal x (m) goal y (m), that of most runs gravity")


def test_a_run_with_other_held_out_tasks_than_its_line_is_left_out(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0])
    write_evaluation(tmp_path / "seed1", [f"1,7,{step},1" for step in range(3)])
    labels, [line] = runs.read(tmp_path)
    assert [run.config["seed"] for run in labels["maml"]] == [2, 3]
    assert line.startswith(f"{tmp_path / 'seed1'}: its held-out tasks are not those")


def holding(text):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def changed(**changes):
    return lambda path: change(path.parent, **changes)


def garbled(path):
    path.write_bytes(path.read_bytes() + b"\xff\xfe,1\n")


def fifo_instead(path):
    path.unlink()
    os.mkfifo(path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def endless_instead(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def too_large(path):
    os.truncate(path, 10**9)  # without taking the space


LOG = "epoch,env_steps,seconds,return_post\n"
EVALUATION = "epoch,phi,step,return\n"
DAMAGES = {
    "config.json": [
        garbled, fifo_instead, folder_instead, endless_instead, too_large,
        holding('{"env": "to'), holding("[]"), holding("3"), holding("[" * 100_000),
        holding('{"a":' * 5000), holding('{"seed": ' + "9" * 5000 + "}"),
        changed(algo="../../x"), changed(algo="=1+1"), changed(algo="_"), changed(algo=""), changed(algo=None),
        changed(algo="a|b"), changed(phi_names="g"),
        changed(seed=10**400), changed(beta=1e300), changed(threshold=math.nan), changed(alpha=math.inf),
        changed(delta="large"), changed(threshold=[1]), changed(beta=True), changed(env="x" * 10_000),
        changed(phi_names=[1]), changed(phi_names=[], range=[]), changed(range=[5.0]), changed(range=[5.0, "15"]),
        changed(values=["x"]), changed(values=3), changed(inner_steps=-1), changed(eval_steps=-1),
    ],
    "log.csv": [
        garbled, fifo_instead, folder_instead, endless_instead, too_large,
        holding("epoch,seconds\n1,2\n"), holding(LOG + "1,2,x,4\n"), holding(LOG + "1,2,3\n"),
        holding("epoch,env_steps,seconds\n1,2,3\n"), holding(LOG + f"1,2,3,{'x' * 1000}\n"),
        holding(LOG + "1,2,3,4,5\n"), holding(LOG + f"1,2,3,{'4' * 200_000}\n"), holding(LOG + "1,2,3,1e200\n"),
        holding(LOG + "1,-2,3,4\n"), holding(LOG + "1,0,3,4\n"), holding(LOG + "1,inf,3,4\n"),
        holding(LOG + "1,2,nan,4\n"), holding(LOG + "1,2,-1,4\n"), holding(LOG + "7,2,3,4\n"),
        holding(LOG + "1,2,3,4\n1,2,3,4\n"), holding(LOG + "1,2,3,4\n2,1,3,4\n"),
    ],
    "eval.csv": [
        garbled, fifo_instead, folder_instead, endless_instead, too_large,
        holding(EVALUATION + "1,5,0,9,9\n1,5,1,9\n1,5,2,9\n"),
        holding("epoch\n1\n"), holding(EVALUATION + "1,5 5,0,9\n1,5 5,1,9\n1,5 5,2,9\n"),
        holding(EVALUATION + "1,5,0,9\n1,5,2,9\n1,5,1,9\n"), holding(EVALUATION + "1,5,0,9\n1,5,1,9\n1,6,2,9\n"),
        holding(EVALUATION + "1,5,0,9\n1,5,1,x\n1,5,2,9\n"), holding(EVALUATION + "1,nan,0,9\n1,nan,1,9\n1,nan,2,9\n"),
        holding("epoch,phi,step,return,x\n1,5,0,9,a\n1,5,1,9,1\n1,5,2,9,1\n"),
        holding("epoch,phi,step,return,x\n1,5,0,9,1e200\n1,5,1,9,1\n1,5,2,9,1\n"),
        holding(EVALUATION + f"1,5,{10**30},9\n"), holding(EVALUATION + f"{10**400},5,0,9\n"),
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "i"), [(name, i) for name, all in DAMAGES.items() for i in range(len(all))])
def test_a_run_that_cannot_be_read_is_left_out_in_one_line(tmp_path, name, i):
    write_run(tmp_path / "maml" / "seed1", "maml", [1.0])
    damaged = tmp_path / "a\x1b[31m\nb" / "seed1"  # before the good run, in a folder with an evil name
    write_run(damaged, "fomaml", [1.0])
    DAMAGES[name][i](damaged / name)
    labels, [line] = runs.read(tmp_path)
    assert list(labels) == ["maml"]
    assert line.startswith(f"{tmp_path}/a\\x1b[31m\\nb/seed1/{name}: ") and line.isprintable()
    assert line.endswith("; the run is left out of the report") and len(line) < 500


def test_columns_of_an_evaluation_that_no_run_writes_are_not_read(tmp_path):
    write_run(tmp_path / "seed1", "maml", [1.0])
    columns = EVALUATION.strip() + ",=x,success,a|b\n"
    text = columns + "".join(f"1,5,{step},9,no,0.{step},no\n" for step in range(3))
    (tmp_path / "seed1" / "eval.csv").write_text(text)
    info = runs.read(tmp_path)[0]["maml"][0].evaluation["info"]
    np.testing.assert_equal(info, {"success": [[0.0], [0.1], [0.2]]})


def test_texts_are_made_printable(tmp_path):
    evil = "\x1b[31m\u2028\n=x"
    labels = labels_of(("maml", {"baseline": [evil, 1]}), ("maml", {"rl": evil}), root=tmp_path)
    assert labels == [
        "maml, rl = \\x1b[31m\\u2028\\n=x",
        "maml, rl = pg, baseline = \\x1b[31m\\u2028\\n=x 1",
    ]
