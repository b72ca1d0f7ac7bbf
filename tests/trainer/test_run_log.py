"""What the log of a run keeps, after an end, an error and a resumption."""

from __future__ import annotations

import json

import pytest
import torch

from megavg.trainer.run_log import RunLog
from tests.trainer.event_files import read_board


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_summary_names_the_best_evaluation_of_the_whole_run(tmp_path, capsys):
    def evaluated(start_step: int, values: dict[int, float]) -> None:
        with RunLog(tmp_path, True, 8, start_step, 1, tensorboard=True) as log:
            for step, value in values.items():
                log.record(step, {"loss": 1.0})
                log.evaluated(step, "seen", {"task": "point", "accuracy": value, "step": step, "rows": []})
            log.finish()

    evaluated(0, {1: 0.5, 2: 0.9, 3: 0.1})
    assert "done: 3 steps in 0:" in capsys.readouterr().out
    evaluated(2, {3: 0.9, 4: 0.25})
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("[megavg] done: 2 steps (and 2 before) in 0:")
    assert said[-2].endswith("; seen best point accuracy 0.900 at step 2, last 0.250"), "of equal ones the first"
    assert said[-1] == f"[megavg] metrics.jsonl in {tmp_path}; tensorboard --logdir {tmp_path / 'tensorboard'}"
    assert [line["eval/seen/accuracy"] for line in lines_of(tmp_path) if "loss" not in line] == [0.5, 0.9, 0.9, 0.25]
    best = read_board(tmp_path / "tensorboard").Scalars("best/seen_accuracy")
    assert [(event.step, event.value) for event in best] == [
        (1, 0.5), (2, pytest.approx(0.9)), (3, pytest.approx(0.9)), (4, pytest.approx(0.9))]


def test_an_error_loses_nothing(tmp_path):
    class Failed(Exception):
        """Stands for what may go wrong in a step."""

    with pytest.raises(Failed), RunLog(tmp_path, True, 8, 0, 1, tensorboard=True) as log:
        log.record(1, {"loss": 2.0})
        log.histograms(1, {"tokens/x": torch.tensor([1.0, 2.0])})
        raise Failed
    log.close()
    assert lines_of(tmp_path) == [{"step": 1, "loss": 2.0}]
    board = read_board(tmp_path / "tensorboard")
    assert [event.value for event in board.Scalars("policy/loss")] == [2.0]
    assert len(board.Histograms("tokens/x")) == 1


def test_a_recorded_step_is_on_the_disk_when_the_process_is_killed(tmp_path):
    """Nothing is closed here: a killed process closes nothing."""
    log = RunLog(tmp_path, True, 8, 0, 1, tensorboard=True)
    log.record(1, {"loss": 2.0})
    assert [event.value for event in read_board(tmp_path / "tensorboard").Scalars("policy/loss")] == [2.0]
    log.close()


def test_a_run_that_begins_anew_leaves_nothing_of_the_old_one(tmp_path):
    """It was killed before its first checkpoint, after an evaluation at step 0."""
    for value in (0.25, 0.5):
        with RunLog(tmp_path, True, 8, 0, 1, tensorboard=True) as log:
            log.evaluated(0, "seen", {"acc_at_50": value})
    assert [line["eval/seen/acc_at_50"] for line in lines_of(tmp_path)] == [0.5]
    events = read_board(tmp_path / "tensorboard").Scalars("eval/seen/acc_at_50")
    assert [(event.step, event.value) for event in events] == [(0, 0.5)]


def test_other_ranks_leave_no_file(tmp_path, capsys):
    with RunLog(tmp_path, False, 8, 0, 1, tensorboard=True) as log:
        log.configuration({})
        log.record(1, {"loss": 2.0})
        log.progress(1, {"loss": 2.0})
        log.evaluated(1, "seen", {"acc_at_50": 1.0})
        log.text(1, "x", "y")
        log.finish()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
