"""The benchmark of layouts: its formulas agree with what it measures, and it says what is wrong with its arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench_layouts import KINDS, MEASURED, RATIOS, TIMED, main, parse_arguments, ratios_of
from tools.layout_runs import Layout
from tools.local_ranks import run_local

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what a small run printed, its JSON); dp2 comes after layouts with stages, which must leave no trace."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    command = [sys.executable, "tools/bench_layouts.py", "--family", "qwen3_vl", "--dtype", "bfloat16",
               "--hidden-size", "64", "--layers", "4", "--image-side", "112", "--rows", "4", "--processes", "2",
               "--repeats", "1", "--json", str(path), "--layouts", "tp2", "pp2", "pp2+recompute", "dp2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_measured_bytes_are_as_predicted(run):
    for stages in run[1]["memory"].values():
        for stage in stages:
            ratios = {kind: measured / predicted for kind, (measured, predicted) in stage["bytes"].items()}
            assert all(abs(ratios[kind] - 1) < 0.02 for kind in ("parameters", "gradients", "optimiser")), ratios
            assert 0.75 < ratios["activations"] < 1.25, ratios


def test_layouts_divide_what_they_should(run):
    memory = run[1]["memory"]
    tp2, dp2 = (memory[name][0]["bytes"] for name in ("tp2", "dp2"))
    assert dp2["parameters"][0] < tp2["parameters"][0]  # the vision tower is not split over tensor parallelism
    assert tp2["activations"][0] < dp2["activations"][0]
    first, last = memory["pp2"]
    assert (first["stage"], last["stage"], first["in_flight"], last["in_flight"]) == (0, 1, 2, 1)
    assert first["layers"] + last["layers"] == 4
    recomputed = memory["pp2+recompute"][0]
    assert recomputed["bytes"]["activations"][0] < 0.6 * first["bytes"]["activations"][0]


def test_all_figures_are_there(run):
    printed, report = run
    assert set(report["ratios"]) == {"tp2 / dp2", "pp2 / dp2", "recompute on / off, pp2"}
    assert all(len(times) == 2 and min(times) == report["seconds"][name]
               for name, times in report["all_seconds"].items())
    assert set(report["memory"]) == set(report["seconds"]) == {"tp2", "pp2", "pp2+recompute", "dp2"}
    assert all(name in printed for name in (*report["seconds"], *report["ratios"], *KINDS))


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from tools.bench_layouts import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "+keep_gathered" in done.stdout, done.stderr


def test_names_of_layouts():
    assert Layout.parse("tp2pp2dp2") == Layout(2, 2, 2) and Layout.parse("one") == Layout()
    assert Layout.parse("pp4+recompute+no_prefetch") == Layout(1, 4, 1, ("recompute", "no_prefetch"))
    for name in {*MEASURED, *TIMED, *(name for pair in RATIOS.values() for name in pair)}:
        Layout.parse(name)


def test_only_layouts_that_fit_are_run():
    assert {Layout.parse(name).world for name in parse_arguments(["--processes", "2"]).measured} == {1, 2}
    assert parse_arguments(["--only", "time"]).measured == [] and parse_arguments(["--only", "memory"]).timed == []


def test_ratios_of_layouts_that_were_not_run_are_left_out():
    assert ratios_of({"pp2": 3.0, "dp2": 2.0, "pp2dp2": 1.0}) == {"pp2 / dp2": 1.5}


@pytest.mark.parametrize("argv, message", [
    (["--layouts", "tp2xp2"], "layout 'tp2xp2' must give sizes of tensor, pipeline and data parallelism"),
    (["--layouts", "tp2tp2"], "layout 'tp2tp2' must give sizes"),
    (["--layouts", "pp0"], "layout 'pp0' must give sizes"),
    (["--layouts", "dp2+recomputed"], "no option 'recomputed'; there are recompute, no_prefetch"),
    (["--layouts", "tp2pp2dp2"], "layout tp2pp2dp2 takes 8 processes; raise --processes=4"),
    (["--layouts", "dp4", "--rows", "6"], "--rows=6 is not divisible by the data-parallel size of dp4"),
    (["--layers", "0"], "--layers must be at least 1"),
])
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_ranks_that_fail_are_reported_and_ended(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\n"
                      "if os.environ['RANK'] == '1':\n    sys.exit('the second one does not like this')\n"
                      "time.sleep(300)\n")
    with pytest.raises(SystemExit, match=r"(?s)rank 1 of 2 ended with exit code 1.*does not like this"):
        run_local(2, str(script), {})
