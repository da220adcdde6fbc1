"""The table of settings: help, defaults, and what a command line becomes."""

import json

import pytest

import run
from harness.checkpoints import RunError
from settings import ALL_SETTINGS, SETTINGS, make_env, parse, plan
from tests.commands import train


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
            assert setting.help in entry
            assert (f"e.g. {setting.flag} {setting.example}" in entry) == (setting.type is not bool)
            required = ("env", "algo", "param", "values", "watch", "report", "like")
            always_given = setting.name in required or setting.type is bool
            assert ("(default " in entry) != always_given, entry


def test_the_examples_of_help_are_accepted():
    required = {
        "env": "cartpole",
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


def test_like_takes_every_setting_of_a_run_and_other_flags_override_it(tmp_path):
    words = ["--range", "-1e-1", 1, "-1.", 1, "--delta", 1e-5, "--medium", "sampled", "--alpha", 0.02]
    train(tmp_path, *words, env="point", algo="directed-maml")
    folder = tmp_path / "point-pg/directed-maml"
    run.main(["--like", str(folder / "delta1e-05/seed1"), "--seed", "7", "--out", str(tmp_path), "--quiet"])
    first, second = (json.loads((folder / f"delta1e-05/seed{seed}/config.json").read_text()) for seed in (1, 7))
    assert first | {"seed": 7} == second and second["range"] == [-0.1, 1, -1, 1] and second["epochs"] == 4
    for seed, words in ((8, ["--lik", str(folder / "delta1e-05/seed1")]), (9, [f"--like={folder}/delta1e-05/seed1"])):
        run.main([*words, "--seed", str(seed), "--out", str(tmp_path), "--quiet"])
        assert first | {"seed": seed} == json.loads((folder / f"delta1e-05/seed{seed}/config.json").read_text())


@pytest.mark.parametrize("text", ['{"algo": "maml", "phi": ["x"]}', "{}", "[]", "3", "not json"])
def test_like_of_an_older_run_or_of_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match="name the folder of a run"):
        parse(["--like", str(tmp_path)])


def test_a_range_of_seeds():
    args = parse(["--env", "point", "--algo", "maml", "--seed", "1-3", "7"])
    assert args.seed == [1, 2, 3, 7]
