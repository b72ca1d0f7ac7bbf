"""The table of reasons: its counts, its shares, and where the log shows it."""

from __future__ import annotations

import json

import pytest

from megavg.trainer.reason_table import ReasonTable
from megavg.trainer.run_log import RunLog

STEP = {"iou: ok": 3, "iou: no JSON": 5, "format: ok": 8}


def test_counts_are_summed_and_begin_anew():
    table = ReasonTable()
    assert table.take() is None
    table.add(STEP)
    table.add({"iou: degenerate | <b>box": 8, "format: ok": 8})
    taken = table.take()
    assert taken.rows == [("format", "ok", 16, 1.0), ("iou", "degenerate | <b>box", 8, 0.5),
                          ("iou", "no JSON", 5, 5 / 16), ("iou", "ok", 3, 3 / 16)]
    assert taken.lines() == ["reasons for the rewards of the last 2 steps:", "  format  100.0%  ok  (16)",
                             "  iou      50.0%  degenerate | <b>box  (8)", "  iou      31.2%  no JSON  (5)",
                             "  iou      18.8%  ok  (3)"]
    assert "| iou | degenerate \\| &lt;b>box | 8 | 50.0% |" in taken.markdown()
    assert table.take() is None


def test_rare_reasons_are_left_out_and_said_so():
    table = ReasonTable()
    table.add({f"iou: reason {i}": i for i in range(1, 14)})
    lines = table.take().lines()
    assert len(lines) == 12 and "reason 13" in lines[1] and lines[-1].startswith("  and 3 rarer ones")


def test_the_log_shows_it_every_so_many_steps_and_at_the_end(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, True, num_steps=5, start_step=0, log_every=2, tensorboard=True)
    for step in range(1, 6):
        log.record(step, {"loss": 1.0, "reasons": STEP})
        log.record(step, {"eval/x/acc": 1.0})
        log.progress(step, {"loss": 1.0})
    log.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "reasons for" in line]
    assert said == ["[megavg] reasons for the rewards of the last 2 steps:"] * 2 + \
        ["[megavg] reasons for the rewards of the last step:"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = events.Tensors("reasons/text_summary")
    assert [event.step for event in texts] == [2, 4, 5]
    assert b"| format | ok | 16 | 100.0% |" in texts[0].tensor_proto.string_val[0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["reasons"] == STEP


def test_runs_without_rewards_and_other_ranks_stay_silent(tmp_path, capsys):
    for is_writer in (True, False):
        log = RunLog(tmp_path, is_writer, num_steps=1, start_step=0, log_every=1, tensorboard=False)
        log.record(1, {"loss": 1.0} if is_writer else {"loss": 1.0, "reasons": STEP})
        log.progress(1, {"loss": 1.0})
        log.close()
    assert "reasons" not in capsys.readouterr().out
