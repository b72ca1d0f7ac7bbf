"""The console under a real terminal, a pipe, Slurm and mpirun: what is drawn, and where a traceback goes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from megavg.trainer import console
from megavg.trainer.console import Pace, clock, figures, phases
from tests.conftest import ROOT

STEP = {"loss": 0.1234, "reward/mean": 0.5, "iou/mean": 0.25, "entropy/mean": 1.5, "tokens_per_second": 12345.6,
        "time/step": 2.0, "time/rollout": 1.24, "time/score": 0.22, "time/data": 0.004, "time/update": 0.5}
FIGURES = "loss 0.123  reward 0.500  IoU 0.250  entropy 1.500  12,346 tok/s"
TIME = r"\d:\d\d:\d\d"
PHASES = "2.0 s: rollout 62 % score 11 % update 25 % other 2 %"

SCRIPT = f"""
import sys, time
from pathlib import Path
from megavg.trainer.run_log import RunLog

STEP = {STEP!r}
with RunLog(Path(sys.argv[1]), True, num_steps=4, start_step=1, log_every=2, tensorboard=False) as log:
    for step in (2, 3, 4):
        log.record(step, STEP)
        log.progress(step, STEP)
        log.say(f"said at {{step}} [bold]plain[/bold]")
        if step == 3 and sys.argv[2] == "fails":
            raise RuntimeError("the step failed\\nin two lines")
    log.evaluated(4, "seen", {{"task": "rec", "acc_at_50": 0.75}})
    log.finish()
print("after the run")
"""


def run_script(folder, ends: str, terminal: bool, **environment: str) -> tuple[str, int]:
    """What a run shows, and its exit status; stdout and stderr go to one place, as on a terminal."""
    master, slave = pty.openpty() if terminal else os.pipe()
    switches = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "NO_COLOR", "FORCE_COLOR")
    env = {key: value for key, value in os.environ.items() if key not in switches}
    env |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), ends], stdin=subprocess.DEVNULL,
                               stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how a terminal says that nobody writes any more
            piece = b""
        if not piece:
            break
        shown += piece
    os.close(master)
    return shown.decode().replace("\r\n", "\n"), process.wait()


@pytest.mark.parametrize(("terminal", "environment"), [
    (False, {}), (True, {"SLURM_JOB_ID": "7"}), (True, {"OMPI_COMM_WORLD_SIZE": "2"}), (True, {"TERM": "dumb"})],
    ids=["pipe", "Slurm", "mpirun", "dumb terminal"])
def test_plain_lines_where_no_bar_can_be_drawn(tmp_path, terminal, environment):
    shown, status = run_script(tmp_path, "well", terminal, **environment)
    assert status == 0 and "\x1b" not in shown and "\r" not in shown
    lines = shown.splitlines()
    assert lines[0] == f"[megavg] step 2/4  {FIGURES}  {PHASES}  0:00:04 left", "the first of this process"
    assert lines[1] == "[megavg] said at 2 [bold]plain[/bold]"
    assert lines[2] == "[megavg] said at 3 [bold]plain[/bold]", "step 3 is not shown: log_every is 2"
    assert lines[3] == f"[megavg] step 4/4  {FIGURES}  {PHASES}"
    assert re.fullmatch(rf"\[megavg\] done: 3 steps \(and 1 before\) in {TIME}; seen best Acc@0.5 0.750 at step 4, "
                        "last 0.750", lines[5])
    assert lines[6] == f"[megavg] metrics.jsonl in {tmp_path}" and lines[7:] == ["after the run"]


def test_a_bar_on_a_terminal(tmp_path):
    shown, status = run_script(tmp_path, "well", terminal=True)
    assert status == 0
    frames = without_codes(shown)
    for step, left in ((2, "0:00:04"), (3, TIME)):
        bar = rf"\[megavg\] ━.* {step}/4 steps {TIME} {left} left *\n  {FIGURES} *\n  {PHASES}"
        assert re.search(bar, frames), step
        assert f"[megavg] said at {step} [bold]plain[/bold]" in frames
    assert frames.rindex("4/4 steps") < frames.index("[megavg] done: 3 steps") < frames.index("after the run")
    assert "\x1b" not in shown[shown.index("[megavg] done"):], "the bar is gone for good"
    assert_cursor_is_shown(shown)


def test_a_traceback_comes_whole_after_the_bar(tmp_path):
    shown, status = run_script(tmp_path, "fails", terminal=True)
    assert status == 1
    start = shown.rindex("Traceback (most recent call last):")
    assert shown[start:].endswith("RuntimeError: the step failed\nin two lines\n")
    assert "━" in shown[:start] and "━" not in shown[start:] and "\x1b" not in shown[start:]
    assert "done:" not in shown
    assert_cursor_is_shown(shown)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def without_codes(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown)


def assert_cursor_is_shown(shown: str) -> None:
    """Also while the bar stands: a killed run leaves the terminal as it is."""
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.rindex(hide) < shown.index(show) < shown.index("[megavg]")


def test_durations():
    assert [clock(seconds) for seconds in (0, 59.6, 3599.4, 3600, 360_061)] == [
        "0:00:00", "0:01:00", "0:59:59", "1:00:00", "100:01:01"]


def test_figures_and_phases_of_a_step():
    assert figures(STEP) == FIGURES and phases(STEP) == PHASES
    assert figures({"loss": 1.5e-5, "entropy/mean": 0.0, "reward/mean": -4321.5}) == \
        "loss 1.5e-05  reward -4,322  entropy 0.000"
    assert phases({"loss": 1.0}) == ""


def test_the_time_left_is_the_mean_of_the_steps_after_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    pace = Pace(10)
    assert pace.left(3, 30.0) == 7 * 30.0, "the first step is all that is known"
    now[0] += 4
    assert pace.left(4, 3.0) == 6 * 4.0, "with what happened between the steps"
    now[0] += 8
    assert pace.left(5, 3.0) == 5 * 6.0
    assert pace.left(10, 3.0) == 0
