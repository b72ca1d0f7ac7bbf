"""The command line of the layout check: its table, its file of figures and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.check_layouts import FIGURES, choose_layouts, judge, parse_arguments, report
from tools.layouts import Layout, read_layout

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_layouts.py"


def run(folder, *arguments, timeout=600):
    return subprocess.run([sys.executable, str(TOOL), *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=timeout)


@pytest.fixture(scope="module")
def checked(checkpoints, tmp_path_factory):
    """A check of a layout that a checkpoint can have and of one that it cannot, and the file that it wrote."""
    folder = tmp_path_factory.mktemp("checked")
    checkpoint = checkpoints("qwen2_5_vl", num_layers=1, vision_depth=1)
    result = run(folder, "--checkpoint", str(checkpoint), "--layouts", "pp2,dp2", "--tolerance", "1e-12", "--json",
                 "out.json")
    assert (folder / "out.json").exists(), result.stderr
    return checkpoint, result, json.loads((folder / "out.json").read_text())


def test_help_answers_in_under_a_second(tmp_path):
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        result = run(tmp_path, "--help")
        durations.append(time.perf_counter() - start)
        assert result.returncode == 0 and "--frozen-tower" in result.stdout
    assert min(durations) < 1.0


def test_a_tiny_model_passes(tmp_path):
    result = run(tmp_path, "--tiny", "qwen3_vl", "--tied", "--processes", "2", "--layouts", "pp2", "--recompute", "on",
                 "--frozen-tower", "both", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\npp2 ") == 2 and "\nPASS: float32" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["tiny"], found["tied"], found["dtype"], found["tolerance"]) == ("qwen3_vl", True, "float32", 1e-5)
    assert [(row["layout"], row["recompute"], row["frozen_tower"], row["ok"]) for row in found["rows"]] == [
        ("pp2", True, False, True), ("pp2", True, True, True)]
    for row in found["rows"]:
        assert all(0 <= row[key] <= 1e-5 for key in FIGURES)
        assert row["worst_gradient"].startswith("model.") and row["worst_weight"].startswith("model.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_past_the_tolerance_the_exit_status_is_1(checked):
    checkpoint, result, found = checked
    assert result.returncode == 1, result.stderr
    assert "PAST THE TOLERANCE" in result.stdout and "FAIL: float32, tolerance 1e-12" in result.stdout
    assert found["checkpoint"] == str(checkpoint) and found["tolerance"] == 1e-12


def test_layouts_that_the_model_cannot_have_are_refused(checked):
    _, result, found = checked
    rows = {row["layout"]: row for row in found["rows"]}
    assert list(rows) == ["dp2", "pp2"]
    assert "1 decoder layers do not fill" in rows["pp2"]["refused"] and "refused: 1 decoder layers" in result.stdout
    assert rows["dp2"]["weights"] <= 1e-5 and not rows["dp2"]["ok"]


@pytest.mark.parametrize("arguments, message", [
    (["--tiny", "qwen3_vl", "--layouts", "tp2,xp2"], "layout 'xp2' must give sizes of tensor, pipeline and data"),
    (["--tiny", "qwen3_vl", "--layouts", "tp2pp2dp2"], "layout tp2pp2dp2 needs 8 processes, but --processes is 4"),
    (["--checkpoint", "nowhere"], "--checkpoint nowhere has no config.json"),
    (["--checkpoint", ".", "--tied"], "--tied is for --tiny"),
    (["--tiny", "qwen3_vl", "--processes", "0"], "--processes 0 must be at least 1"),
    ([], "one of the arguments --checkpoint --tiny is required"),
])
def test_mistakes_are_told_at_once(tmp_path, arguments, message):
    result = run(tmp_path, *arguments, timeout=20)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_a_checkpoint_of_another_family_is_refused(checkpoints, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in checkpoints("qwen2_5_vl", num_layers=1, vision_depth=1).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    result = run(tmp_path, "--checkpoint", "other", "--processes", "1")
    assert result.returncode == 2
    assert "model_type='llama'" in result.stderr and "Traceback" not in result.stderr


def test_layouts_by_name():
    assert read_layout("pp2tp4") == Layout(4, 2, 1) and str(Layout(4, 2, 1)) == "tp4pp2"
    assert str(Layout(1, 1, 1)) == "tp1" and read_layout("tp1") == (1, 1, 1)
    for wrong in ("", "tp", "tp0", "tp2tp2", "2tp", "tp2-dp2"):
        with pytest.raises(ValueError, match="must give sizes"):
            read_layout(wrong)


def test_choosing_layouts():
    assert list(map(str, choose_layouts(None, False, 4))) == ["tp2dp2", "tp4", "pp2dp2", "tp2pp2", "pp4"]
    assert [str(layout) for layout in choose_layouts(None, False, 8)][-1] == "tp2pp2dp2"
    assert list(map(str, choose_layouts(None, False, 2))) == ["tp1", "dp2", "tp2", "pp2"]
    assert list(map(str, choose_layouts("pp4,tp2,pp4", False, 4))) == ["tp2", "pp4"]
    assert len(choose_layouts(None, True, 4)) == 1 + 3 + 6


def test_what_is_judged():
    row = dict.fromkeys(FIGURES, 1e-6)
    assert judge(row, "float32", 1e-6)
    assert not judge(row | {"gradients": 2e-6}, "float32", 1e-6)
    assert not judge(row | {"entropy": float("inf")}, "float32", 1.0)
    assert judge(row | {"entropy": 3.0}, "bfloat16", 1e-6) and not judge(row | {"loss": 3.0}, "bfloat16", 1e-6)


def test_refused_layouts_fail_where_they_were_named_or_are_all(capsys):
    measured = {"layout": "tp2", "recompute": False, "frozen_tower": False, "ok": True, **dict.fromkeys(FIGURES, 0.0)}
    refused = {"layout": "pp2", "recompute": False, "frozen_tower": False, "refused": "too few layers"}
    every, named = (parse_arguments(["--tiny", "qwen2_vl", *which]) for which in (["--all"], ["--layouts", "tp2,pp2"]))
    assert report([measured, refused], every) and "refused: too few layers" in capsys.readouterr().out
    assert not report([measured, refused], named) and "FAIL" in capsys.readouterr().out
    assert not report([refused], every) and "FAIL" in capsys.readouterr().out
