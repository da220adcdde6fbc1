"""What an epoch leaves to log: seconds and rows, and when the rows reach the disk."""

import math

import pytest
import torch

import run
from harness import log
from harness.checkpoints import Run
from tests.commands import rows
from tests.test_device import make_batch


class Place:
    """A sampler that took half a second."""

    def take_seconds(self):
        return 0.5


def test_the_runs_of_a_batch_share_its_seconds():
    batch = make_batch("cpu", "--seed", "1", "2", "3", "4")
    batch.set_schedules()
    measured = log.fetched(run.train_epoch(batch))
    batch.sample = Place()
    assert log.log_epoch(batch, measured, 2.0) == [True] * 4
    for each in batch.runs:
        assert each.state["totals"]["seconds"] == 2.0 / 4 and each.state["totals"]["sample_seconds"] == 0.5 / 4
        (row,) = each.state["log"]
        assert row[:4] == [1, each.state["totals"]["env_steps"], 0.5, 0.125]


def test_the_mean_of_what_an_environment_reports_is_over_the_episodes_that_report_it():
    rewards = torch.zeros(1, 1, 3, 5)
    info = torch.tensor([[1.0, math.nan, 4], [math.nan, math.nan, 5], [2, math.nan, 9]]).view(1, 1, 3, 3)
    means = log.info_means({"rewards": rewards, "info": info})
    assert means.flatten().tolist() == pytest.approx([1.5, math.nan, 6], nan_ok=True) and means.shape == (1, 1, 3)
    assert log.info_means({"rewards": rewards}).shape == (1, 1, 0)


@pytest.fixture
def one_run(tmp_path):
    (tmp_path / "log.csv").write_text("epoch\n")
    return Run(tmp_path, {}, {"log": [], "eval": []})


def test_rows_are_written_when_a_second_has_passed_when_asked_and_at_the_end(one_run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    written = one_run.folder / "log.csv"
    with log.Rows() as kept:
        kept.add(one_run, "log", [[1]])
        assert rows(written) == [] and one_run.state["log"] == [[1]]
        now[0] = 1.5
        kept.add(one_run, "log", [[2]])
        assert rows(written) == [{"epoch": "1"}, {"epoch": "2"}]
        kept.add(one_run, "log", [[3]])
        kept.append()
        assert len(rows(written)) == 3
        kept.add(one_run, "log", [[4]])
        assert len(rows(written)) == 3
    assert [row["epoch"] for row in rows(written)] == ["1", "2", "3", "4"]


def test_rows_are_written_where_training_ends_in_an_error(one_run):
    with pytest.raises(RuntimeError, match="no"), log.Rows() as kept:
        kept.add(one_run, "log", [[1]])
        raise RuntimeError("no")
    assert rows(one_run.folder / "log.csv") == [{"epoch": "1"}]


def test_a_rank_that_writes_no_files_keeps_its_rows(one_run):
    with log.Rows(writes=False) as kept:
        kept.add(one_run, "log", [[1]])
    assert rows(one_run.folder / "log.csv") == [] and one_run.state["log"] == [[1]]
