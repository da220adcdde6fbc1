"""The table of settings: help, defaults, and what a command line becomes."""

import json
import os

import pytest
import torch

import envs
import run
from harness import checkpoints, trained
from harness.checkpoints import RunError
from harness.plan import make_env, plan
from harness.settings import ALL_SETTINGS, DIRECTED, SETTINGS, applies, parse
from maml import LEARNERS
from tests.commands import refused, rows, train


def test_help_gives_every_flag_in_its_group_with_an_example_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out.split("\n\nexample: ")[0]
    titles = list(SETTINGS)
    groups = {}
    for i, title in enumerate(titles):
        _, _, body = text.partition(f"\n\n{title}:\n")
        groups[title] = body.split(f"\n\n{titles[i + 1]}:\n")[0] if i + 1 < len(titles) else body
    for title, settings in SETTINGS.items():
        entries = [" ".join(entry.split()) for entry in ("\n" + groups[title]).split("\n  --")[1:]]
        assert [entry.split()[0] for entry in entries] == [setting.flag.removeprefix("--") for setting in settings]
        for setting, entry in zip(settings, entries, strict=True):
            assert setting.text in entry
            assert (f"e.g. {setting.flag} {setting.example}" in entry) == (setting.type is not bool)
            required = ("env", "algo", "param", "values", "watch", "report", "like")
            always_given = setting.name in required or setting.type is bool
            assert ("(default " in entry) != always_given, entry


def test_the_examples_of_help_are_accepted():
    required = {
        "env": "lunarlander",
        "algo": "directed-maml++ meta-sgd imaml sharp-maml",
        "outer_steps": "2",
        "rl": "ac",
        "watch": "run",
    }
    for name, setting in ALL_SETTINGS.items():
        words = [
            word
            for key, value in required.items()
            if key != name
            for word in ("--" + key.replace("_", "-"), *value.split())
        ]
        if setting.type is not bool and name not in ("like", "report"):  # what must exist; what stands alone
            parse([*words, setting.flag, *setting.example.split()])


def test_defaults_are_table_i():
    args = parse(["--env", "cartpole", "--algo", "directed-maml"])
    [(_, planned)] = plan(args, "directed-maml", make_env(args))
    table = {"delta": 0.005, "alpha": 0.001, "beta": 0.001, "gamma": 0.99, "tasks": 5, "trajectories": 10}
    assert {key: planned[key] for key in table} == table
    others = {"inner_steps": 1, "horizon": 200, "optimizer": "sgd", "medium": "mean"}
    assert {key: planned[key] for key in others} == others


def test_settings_that_an_algorithm_does_not_have_are_none_in_its_runs():
    args = parse(["--env", "cartpole", "--algo", "maml", "directed-meta-sgd", "--delta", "0.1"])
    runs = {algo: plan(args, algo, make_env(args))[0][1] for algo in args.algo}
    assert runs["maml"]["delta"] is runs["maml"]["medium"] is runs["maml"]["beta_alpha"] is None
    assert runs["directed-meta-sgd"]["delta"] == 0.1
    assert runs["directed-meta-sgd"]["beta_alpha"] == pytest.approx(0.001 * 0.001)  # α times β
    assert runs["maml"]["gae_lambda"] is None


def test_like_takes_the_settings_of_a_run_and_other_flags_override_them(tmp_path):
    words = ["--range", "-1e-1", 1, "-1.", 1, "--delta", 1e-5, "--medium", "sampled", "--alpha", 0.02]
    train(tmp_path, *words, env="point", algo="directed-maml")
    folder, more = tmp_path / "point-pg/directed-maml", ["--epochs", "4", "--eval-every", "2", "--out", str(tmp_path)]
    first = json.loads((folder / "delta1e-05/seed1/config.json").read_text())
    assert first["range"] == [-0.1, 1, -1, 1]
    run.main([f"--like={folder}/delta1e-05/seed1", "--seed", "7", "--quiet", *more])
    assert json.loads((folder / "delta1e-05/seed7/config.json").read_text()) == first | {"seed": 7}
    run.main(["--like", str(folder / "delta1e-05/seed1"), "--algo", "fomaml", "--quiet", *more])  # which has no δ
    undirected = json.loads((tmp_path / "point-pg/fomaml/seed1/config.json").read_text())
    assert undirected == first | {"algo": "fomaml", "delta": None, "medium": None, "delta_schedule": None}


@pytest.mark.parametrize("text", ['{"algo": "maml", "phi": ["x"]}', "{}", "[]", "3", "not json", "[" * 10**5])
def test_like_of_an_older_run_or_of_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="name the folder of a run"):
        parse(["--like", str(tmp_path)])


GOOD = {"phi_names": ["x"], "env": "cartpole", "algo": "maml"}


@pytest.mark.parametrize(
    "settings",
    [
        {"out": "/victim", "overwrite": True, "resume": True, "watch": "/victim", "like": "/victim", "workers": 9},
        {"epochs": 10**9, "eval_every": 1, "device": "cuda", "threads": 9, "threshold": 3, "phi": [1]},
    ],
)
def test_like_takes_nothing_from_a_config_but_what_makes_a_run_what_it_is(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    plain = vars(parse(["--like", str(tmp_path)]))
    (tmp_path / "config.json").write_text(json.dumps(GOOD | settings))
    assert vars(parse(["--like", str(tmp_path)])) == plain


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rl": ["pg", "--out", "/victim"]}, "rl is \\['pg'"),
        ({"rl": "pg --out /victim"}, "'pg --out /victim': choose from"),
        ({"seed": "1-1000"}, "seed is 1-1000"),
        ({"seed": [True]}, "'True': expected a finite whole number"),
        ({"beta": [[0.1]]}, "beta is"),
        ({"beta": 1e999}, "'inf': expected a finite number"),
        ({"hidden": {"64": 64}}, "hidden is"),
        ({"oracle": "yes"}, "oracle is yes"),
        ({"env": "evil:X"}, "runs the code of module evil:X; if you trust it, give --env evil:X too"),
    ],
)
def test_like_refuses_values_that_a_flag_would_not_take(tmp_path, settings, says):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | settings))
    with pytest.raises(RunError, match=says):
        parse(["--like", str(tmp_path)])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has none")
def test_like_does_not_wait_for_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(RunError, match="config.json: not a regular file"):
        parse(["--like", str(tmp_path)])


def test_like_makes_the_environment_of_a_module_only_if_env_names_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"env": "evil:X", "param": ["g"], "range": [1, 2]}))
    assert parse(["--like", str(tmp_path), "--env", "evil:X"]).param == ["g"]


@pytest.mark.parametrize("setting", ALL_SETTINGS.values(), ids=lambda setting: setting.name)
def test_an_empty_list_is_refused_for_every_flag(setting):
    with pytest.raises(RunError, match=f"^{setting.flag}: expected a value, not --"):
        parse(["--env", "cartpole", "--algo", "maml", f"{setting.flag}=--"])


def test_flags_are_not_abbreviated():
    with pytest.raises(RunError, match="--over: did you mean --overwrite"):
        parse(["--env", "cartpole", "--algo", "maml", "--over"])


@pytest.mark.parametrize("text", ["1-", "1-x", "2-1.5"])
def test_a_wrong_range_of_seeds_is_named_in_full(text):
    with pytest.raises(RunError, match=f"'{text}': expected FIRST-LAST"):
        parse(["--env", "cartpole", "--algo", "maml", "--seed", text])


def test_a_run_from_before_a_flag_existed_has_its_default(tmp_path, capsys):
    """Resumed by the command that began it, also where that says the default; refused with another value."""
    words, path = ["--medium", "sampled"], tmp_path / "cartpole-pg/directed-maml/delta0.005/seed1/checkpoint.pt"
    train(tmp_path, *words, algo="directed-maml", epochs=1)
    state = torch.load(path)
    for name in ("optimizer", "oracle", "clip", "gae_lambda", "baseline", "delta_schedule", "rho"):
        del state["settings"][name]
    path.write_bytes(checkpoints.packed(state))
    line = refused(capsys, tmp_path, *words, "--resume", "--optimizer", "adam", algo="directed-maml")
    assert "began with optimizer sgd, this command says adam; give --optimizer as before" in line
    train(tmp_path, *words, "--resume", "--optimizer", "sgd", algo="directed-maml", epochs=2)
    assert len(rows(path.with_name("log.csv"))) == 2 and trained.load(path.parent).settings["optimizer"] == "sgd"


# --- flags that do nothing ---

TWICE, EVALUATED = ["--outer-steps", "2"], ["--eval-every", "1"]
# {flag: (what it needs beside it, another value than its default)}: a new flag needs a line here
OTHER = {
    "env": ([], ["velocity"]),
    "param": (["--env", "Pendulum-v1", "--range", "1", "2", "--param", "g"], ["l"]),
    "make": (["--env", "Pendulum-v1", "--range", "1", "2", "--param", "l"], ["g=5"]),
    "range": ([], ["-1", "0", "-1", "1"]),
    "values": ([], ["0", "0", "0.1", "0.1"]),
    "task_dist": ([], ["skewed"]),
    "horizon": ([], ["4"]),
    "oracle": ([], []),
    "rl": ([], ["ac"]),
    "seed": ([], ["2"]),
    "inner_steps": ([], ["3"]),
    "outer_steps": ([], ["2"]),
    "clip": (TWICE, ["0.0001"]),
    "kl_penalty": (TWICE, ["10"]),
    "medium": ([], ["random"]),
    "optimizer": ([], ["adam"]),
    "hidden": ([], ["4"]),
    "alpha": ([], ["0.2"]),
    "beta": ([], ["0.1"]),
    "delta": ([], ["0.5"]),
    "delta_schedule": (["--epochs", "2"], ["decay"]),
    "beta_alpha": (["--epochs", "2"], ["0.3"]),
    "lambda_": ([], ["3"]),
    "cg_steps": ([], ["3"]),
    "cg_damping": ([], ["0"]),
    "first_order_epochs": ([], ["1"]),
    "multi_step_epochs": ([], ["0"]),
    "rho": ([], ["0.5"]),
    "tasks": ([], ["3"]),
    "trajectories": ([], ["3"]),
    "gamma": ([], ["0.5"]),
    "gae_lambda": (["--rl", "ac"], ["0.5"]),
    "estimator": ([], ["dice"]),
    "advantages": ([], ["raw"]),
    "baseline": ([], ["task"]),
    "eval_steps": (EVALUATED, ["2"]),
    "eval_alpha": (EVALUATED, ["0.3"]),
    "eval_range": (EVALUATED, ["-1", "0", "-1", "0"]),
    "eval_values": (EVALUATED, ["1", "1"]),
}
TINY = {"--env": "point", "--epochs": "1", "--tasks": "2", "--trajectories": "2", "--horizon": "3", "--hidden": "3"}
TINY |= {"--eval-steps": "1", "--alpha": "0.1", "--beta": "0.05", "--workers": "1"}
TINY_OF = {"maml++": ["--first-order-epochs", "0"]}


def tiny(words, algos):
    """A command with these words, and of TINY what they do not say."""
    own = [word for algo in algos for word in TINY_OF.get(algo.removeprefix("directed-"), [])]
    rest = [word for flag, value in TINY.items() if flag not in words for word in (flag, value)]
    return ["--algo", *algos, *own, *words, *rest]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """tables(words, algos): {algorithm: its log and evaluations}, of a tiny command; evaluated where EVALUATED."""
    evaluate = run.evaluate
    monkeypatch.setattr(run.report, "write", lambda root: ([], []))
    monkeypatch.setattr(run.checkpoints, "save", lambda runs: None)

    def tables(words, algos):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        monkeypatch.setattr(run, "evaluate", evaluate if EVALUATED[0] in words else lambda batch: None)
        run.main([*tiny(words, algos), "--out", str(out), "--quiet"])
        logs = {path.relative_to(out).parts[1]: path for path in out.rglob("log.csv")}
        return {algo: (rows(path), rows(path.with_name("eval.csv"))) for algo, path in logs.items()}

    return tables


def accepting(setting, words, algos):
    """Those of the algorithms that accept the flag, as they would alone."""
    args = parse(tiny(words, algos))
    env = make_env(args)

    def accepts(algo):
        try:
            plan(args, algo, env)
        except RunError:
            return False
        return applies(setting, args, algo)

    return [algo for algo in algos if accepts(algo)]


def test_every_flag_changes_the_run_of_every_algorithm_or_is_refused(tables):
    before = {}
    for setting in (x for x in ALL_SETTINGS.values() if x.identity and x.name != "algo"):
        needed, value = OTHER[setting.name]
        algos = tuple("directed-" + name if setting.needs is DIRECTED else name for name in LEARNERS)
        key = (*needed, *algos)
        before[key] = before.get(key) or tables(needed, algos)
        changed = [*needed, setting.flag, *value]
        accepted = accepting(setting, changed, algos)
        after = tables(changed, accepted)
        assert accepted, setting.flag
        for algo in accepted:
            assert after[algo] != before[key][algo], (setting.flag, algo)


@pytest.mark.parametrize(
    ("algo", "words", "says"),
    [
        (
            "fomaml",
            ["--estimator", "dice"],
            "--estimator does nothing without an algorithm whose meta-gradient",
        ),
        ("reptile sharp-fomaml", ["--estimator", "dice"], "--estimator does nothing"),
        ("maml", ["--estimator", "dice", "--inner-steps", 0], "--estimator does nothing"),
        ("maml", ["--estimator", "dice", "--alpha", 0], "--estimator does nothing"),
        ("imaml", ["--estimator", "dice", "--cg-steps", 0], "--estimator does nothing"),
        ("imaml", ["--cg-damping", 3, "--cg-steps", 0], "imaml, and --cg-steps 1 or more"),
        ("maml++", ["--multi-step-epochs", 3, "--inner-steps", 1], "maml++, and --inner-steps 2 or more"),
    ],
)
def test_flags_that_do_nothing_beside_others_are_refused(tmp_path, capsys, algo, words, says):
    assert says in refused(capsys, tmp_path, *words, algo=algo)


def test_what_an_environment_reports_is_asked_of_gymnasiums_alone_and_not_as_a_column_of_another(tmp_path, capsys):
    for env in envs.ENVS:
        error = refused(capsys, tmp_path, "--info", "success", env=env)
        assert "--info does nothing without an environment of gymnasium's" in error
    for name in ("return", "phi", "=1+1", 'a"b', "a\nb", "", " x"):
        says = "expected letters, digits, blanks and _ . : / -, and other than epoch, phi, step, return"
        assert says in refused(capsys, tmp_path, f"--info={name}", env="lunarlander")
    assert "separate values by spaces: a b" in refused(capsys, tmp_path, "--info", "a,b", env="lunarlander")


def test_a_flag_that_one_of_several_algorithms_needs_is_accepted_for_all(tmp_path):
    train(tmp_path, "--estimator", "dice", algo="fomaml maml", epochs=1)
    assert json.loads((tmp_path / "cartpole-pg/maml/seed1/config.json").read_text())["estimator"] == "dice"
