"""A run whose ranks are killed again and again ends as the run that nobody kills, bit for bit (tools/kill_test.py)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megavg.checkpoint.train_state import read_trainer_state
from tools import kill_test
from tools.killed_runs import KilledRun, Moment, differences, run_tree

pytestmark = pytest.mark.slow

RANKS, STEPS, KILLS = 2, 2, 3


@pytest.fixture(scope="module")
def tested(warm_up, few_scenes, tmp_path_factory) -> tuple[Path, dict, int]:
    """What the tool leaves, its report and its exit status."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "warm-up").symlink_to(warm_up)
    (folder / "scenes").symlink_to(few_scenes)
    code = kill_test.main(["--kills", str(KILLS), "--ranks", str(RANKS), "--steps", str(STEPS), "--seed", "1",
                           "--out", str(folder), "--json", str(folder / "report.json")])
    return folder, json.loads((folder / "report.json").read_text()), code


def test_killed_at_random_moments_it_ends_the_same(tested):
    _, report, code = tested
    assert code == 0 and report["ok"] and report["wrong"] == [] and report["kills"] == KILLS
    assert report["layout"] == "TP1 x PP1 x DP2" and sum(report["phases"].values()) == KILLS


def test_the_run_keeps_what_a_kill_could_lose(tested):
    lines = [json.loads(line) for line in (tested[0] / "peace" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [
        (0, False), (1, True), (2, True), (2, False)]
    assert len({line["ecvgpo/alpha"] for line in lines if "loss" in line}) == STEPS, "the algorithm's state moves"
    first, last = (read_trainer_state(tested[0] / "peace" / "checkpoints" / f"step-00000{step}") for step in (1, 2))
    assert first["data"] != last["data"], "and so does the place in the data"
    assert all(line["gradient_norm"] > 0 for line in lines if "loss" in line)


def test_killed_while_a_checkpoint_is_written_in_the_background(tested):
    folder = tested[0]
    run = KilledRun(folder / "background", RANKS, run_tree(folder, folder / "background", ranks=RANKS, steps=STEPS,
                                                           background=True))
    end = run.start(Moment("writing", 2, 0.0))
    assert end.killed and end.half_written and end.newest == "step-000001"
    assert not run.start(None).killed
    assert run.problems == [] and differences(folder / "peace", run.folder) == []


def test_killed_between_an_evaluations_result_and_its_line(tested):
    folder = tested[0]
    shutil.copytree(folder / "peace", folder / "unlined")
    metrics = folder / "unlined" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]) + '{"step": 2, "eval/se')
    run = KilledRun(folder / "unlined", RANKS, run_tree(folder, folder / "unlined", ranks=RANKS, steps=STEPS))
    assert not run.start(None).killed
    assert differences(folder / "peace", run.folder) == []


def test_what_differs_is_told(tested, tmp_path):
    peace, other = tested[0] / "peace", tmp_path / "other"
    shutil.copytree(peace, other)
    lines = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines.replace('"lr": ', '"lr": 1', 1))
    (other / "evaluation" / "seen-000002.json").write_text("{}")
    weights = other / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    first, *rest = differences(peace, other)
    assert re.fullmatch(r"metrics.jsonl, line 2: lr is 10.0001 instead of 0.0001 \(1 figures differ\)", first)
    assert rest == ["evaluation/seen-000002.json differs", "hf/model.safetensors differs"]
    shutil.rmtree(other / "checkpoints" / "step-000002")
    assert differences(peace, other)[-1] == "the last checkpoint is step-000001 instead of step-000002"


def test_lost_and_damaged_checkpoints_are_told(tested, tmp_path):
    shutil.copytree(tested[0] / "peace", tmp_path / "run")
    run = KilledRun(tmp_path / "run", RANKS, run_tree(tested[0], tmp_path / "run", steps=STEPS))
    assert run._check() == "step-000002" and run.problems == []
    (tmp_path / "run" / "checkpoints" / "step-000002" / "config.yaml").write_text("")
    run._check()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    run._check()
    (tmp_path / "run" / "checkpoints" / "step-000001").rename(tmp_path / "run" / "checkpoints" / "step-000001.tmp")
    run._half_written()
    assert len(run.problems) == 3 and "config.yaml has 0 bytes" in run.problems[0]
    assert run.problems[1:] == ["the newest checkpoint was step-000002, and is now step-000001",
                                "no checkpoint was there, although step-000001 had been whole"]


@pytest.mark.parametrize("argv,words", [
    (["--ranks", "4", "--tp", "3"], "--ranks 4 is not divisible by --tp 3 * --pp 1"),
    (["--kills", "0"], "every number but --seed is at least 1"),
])
def test_wrong_arguments(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        kill_test.main(argv)
    assert left.value.code == 2 and words in capsys.readouterr().err
