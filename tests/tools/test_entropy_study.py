"""The study: its plan, its statistics and verdicts, its report of whatever there is, and a small real one."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import re
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import psutil
import pytest

from megavg.protocols.config import ConfigError
from megavg.trainer.config import resolve
from tools.entropy_study import CONFIG, main
from tools.study_chart import Panel, chart, ticks
from tools.study_plan import check_noises, mark_of, plan, read_study
from tools.study_report import differences, mean_and_error, read_results, verdict, write_report
from tools.study_runs import ChangedConfiguration, Runner, final_figures, read_result, unfinished, write_json

SMALL = ["only=[grpo,ecvgpo_minus25]", "seeds=[0]", "noises=[0]"]
ROOT = Path(__file__).resolve().parents[2]
FACTS = {"command": "python tools/entropy_study.py", "workers": 2, "device": "CPU"}


@pytest.fixture(scope="module")
def study():
    return read_study(CONFIG)


def test_the_whole_plan(study):
    """8 methods at every level of noise, 2 at three, 7 at two; seed by seed, the baseline first."""
    check_noises(study)
    tasks = plan(study)
    assert len(tasks) == 3 * (1 + 8 * 4 + 2 * 3 + 7 * 2)
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    for seed in range(3):
        own = [task for task in tasks if task.seed == seed]
        assert [task.name for task in own[:3]] == [f"seed{seed}/warmup", f"seed{seed}/noise0/grpo",
                                                   f"seed{seed}/noise0.2/grpo"]
        assert all(task.needs == own[0].name for task in own[1:])
    assert len({task.name for task in tasks}) == len({task.key for task in tasks}) == len(tasks)
    controls = {task.noise for task in tasks if task.method in ("two_stage_reversed", "vepo_bottom",
                                                                "saei_random_sign", "saei_all_tokens")}
    assert controls == {0.0, 0.5}


def test_every_run_resolves_to_what_its_method_says(study, tmp_path):
    configs = {task.name: resolve(task.tree_in(tmp_path)) for task in plan(study) if task.seed == 1}
    warmup, half, reverse = (configs[f"seed1/{name}"] for name in ("warmup", "noise0.5/ecvgpo_plus50",
                                                                   "noise0.5/two_stage_reversed"))
    assert warmup.algorithm_name == "sft" and warmup.trainer.export_hf and warmup.data.noise.probability == 0
    assert half.model.path == f"{warmup.trainer.output_dir}/hf" and half.algorithm.alpha == 0.5
    assert half.data.noise.probability == 0.5 and half.trainer.seed == 1 and not half.trainer.export_hf
    assert reverse.algorithm.variant == "min_to_max" and half.data.shards == [f"{tmp_path}/data/train"]
    assert not [name for name, config in configs.items() if config.trainer.save_every or config.trainer.tensorboard]
    assert mark_of(study, "ecvgpo_plus50") == "[ours]" and mark_of(study, "top_entropy") == "[exact]"


def test_what_a_key_depends_on(study):
    """A warm-up's options change its runs; the study's folder, another method and the report do not."""
    def keys(*overrides):
        return {task.name: task.key for task in plan(read_study(CONFIG, overrides=overrides))}

    before = keys()
    assert all(key != before[name] for name, key in keys("warmup.optimizer.lr=2e-3").items())
    assert all(key != before[name] for name, key in keys("data.train=6000").items())
    assert all(key != before[name] for name, key in keys("checkpoint.hidden_size=64").items())
    changed = keys("methods.vepo.overrides={algorithm.name: vepo, algorithm.keep: 0.3}", "claims=[]")
    assert {name.split("/")[-1] for name, key in changed.items() if key != before[name]} == {"vepo"}


def test_the_quick_form_is_smaller():
    tasks = plan(read_study(CONFIG, quick=True))
    assert len(tasks) <= 12 and {task.seed for task in tasks} == {0} and tasks[1].method == "grpo"
    assert plan(read_study(CONFIG, True, ["seeds=[4]"]))[0].name == "seed4/warmup"


@pytest.mark.parametrize("override, message", [
    ("only=[gpro]", "gpro.*grpo"), ("seeds=[0, 0]", "seeds"), ("methods.vepo.overides={}", "overides.*overrides"),
    ("methods.a b={}", "'a b' may only hold"), ("run.trainer.num_stepz=3", "num_stepz.*num_steps"),
    ("methods.vepo.overrides={algorithm.name: vepo, algorithm.kep: 0.3}", "algorithm.kep.*keep")])
def test_mistakes_are_named_before_anything_starts(override, message, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), override]) == 2
    assert not (tmp_path / "out").exists()
    assert re.search(message, capsys.readouterr().err, re.S)


def test_a_level_that_the_study_lacks_is_refused(tmp_path):
    text = CONFIG.read_text().replace("noises: [0, 0.5]\n    overrides: {algorithm.name: vepo",
                                      "noises: [0, 0.05]\n    overrides: {algorithm.name: vepo")
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match="vepo_bottom.*0.05"):
        check_noises(read_study(tmp_path / "study.yaml"))


def test_mean_and_standard_error_by_hand():
    """1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, s^2 = 14 / 3, error sqrt(14 / 12)."""
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 12), abs=1e-15)
    assert mean_and_error([0.5]) == (0.5, None)


@pytest.mark.parametrize("values, expected", [
    ([], "not run"), ([9.0, 9.0], "too few pairs"),
    ([1.0, 2.0, 3.0], "confirmed"),  # 2 > 2 * 0.577
    ([-1.0, -2.0, -3.0], "contradicted"),
    ([1.0, 2.0, 6.0], "not seen"),  # 3 < 2 * 1.53
    ([0.0, 1.0, 2.0, 1.0, 0.0, 2.0], "confirmed"),  # 1 > 2 * 0.365
    ([-1.0, 0.0, 1.0], "not seen"), ([0.0, 0.0, 0.0], "not seen")])
def test_the_rule_of_verdicts(values, expected):
    assert verdict(values) == expected


def test_final_figures_by_hand():
    """20 steps: a tenth is 2; steps 15 and 16 end at 80 %."""
    entropy = [1.0, 3.0, *[0.0] * 12, 6.0, 10.0, 0.0, 0.0, 1.0, 3.0]
    final = final_figures({"entropy/mean": entropy, "reward/mean": [0.0] * 18 + [0.5, 1.0],
                           "saei/entropy_clean": [1.0, 1.0], "saei/entropy_attacked": [1.5, 2.5]},
                          {"step": [0, 20], "acc_at_50": [0.1, 0.7], "mean_iou": [0.2, 0.6], "parse_rate": [1.0, 0.9]})
    assert final == {"acc_at_50": 0.7, "mean_iou": 0.6, "parse_rate": 0.9, "entropy": 2.0, "entropy_rise": 4.0,
                     "entropy_fall": 0.25, "reward": 0.75, "saei_gain": 1.0}


def made_up(task, accuracy: float, entropy: float) -> dict:
    final = {"acc_at_50": accuracy, "mean_iou": accuracy - 0.1, "parse_rate": 1.0, "entropy": entropy,
             "entropy_rise": 1.5, "entropy_fall": 0.5}
    curves = {"step": [1, 2], "entropy/mean": [0.4, entropy], "reward/mean": [0.1, 0.2], "loss": [0.0, 0.0]}
    return {"name": task.name, "key": task.key, "method": task.method, "noise": task.noise, "seed": task.seed,
            "seconds": 30.0, "final": final, "curves": curves, "num_parameters": 3_000_000,
            "evaluations": {"step": [0, 2], "acc_at_50": [0.5, accuracy], "mean_iou": [0.4, accuracy - 0.1]}}


def leave(study, out, accuracies: dict[tuple[str, float], list[float]]) -> None:
    """Results of the warm-ups, and of the methods named, seed by seed."""
    for task in plan(study):
        if task.kind == "warmup":
            write_json(out / task.name / "result.json", made_up(task, 0.5, 0.4))
        elif task.seed < len(accuracies.get((task.method, task.noise), [])):
            accuracy = accuracies[task.method, task.noise][task.seed]
            write_json(out / task.name / "result.json", made_up(task, accuracy, 1 - accuracy))


def test_report_of_partial_and_negative_results(study, tmp_path):
    """VEPO is better in every pair, two-stage worse, ECVGPO has two pairs; the rest has not run."""
    out, folder = tmp_path / "out", tmp_path / "report"
    leave(study, out, {("grpo", 0.0): [0.50, 0.60, 0.55], ("grpo", 0.5): [0.40, 0.45],
                       ("vepo", 0.0): [0.60, 0.71, 0.64], ("two_stage", 0.0): [0.40, 0.49, 0.46],
                       ("ecvgpo_minus25", 0.5): [0.50, 0.60]})
    results = write_report(study, out, folder, FACTS)
    assert len(results.done) == 13 and len(results.missing) == 156 - 13
    page = (folder / "index.md").read_text()
    assert "**13 of 156 runs are done**" in page and "3.0 million parameters" in page and "CPU" in page
    assert "| vepo | 3 | 0.650 ± 0.032 |" in page and "| +0.100 ± 0.006 |" in page

    def row(text: str) -> str:
        line, = [line for line in page.splitlines() if line.startswith(f"| {text}")]
        return line

    better = row("VEPO is better than GRPO")
    assert "vepo [exact] - grpo [exact]" in better and "+0.100 ± 0.006 | 3 |" in better
    assert better.endswith("**confirmed** |")
    assert row("two stages are better than GRPO on clean labels").endswith("**contradicted** |")
    assert "-0.100 ± 0.006 | 3 | 0%: -0.100 ± 0.006" in row("two stages are better than GRPO on clean")
    assert row("ECVGPO is better than GRPO").endswith("**too few pairs** |") and "| 2 | 50%:" in row("ECVGPO is better")
    assert row("SaEI is better than GRPO").endswith("**not run** |")
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13 and rows[0]["method"] == "grpo" and float(rows[0]["acc_at_50"]) == 0.5
    named = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert named and all(xml.etree.ElementTree.parse(folder / name) for name in named)
    assert "seed0/noise1/grpo" in page.split("## Not run yet")[1]


def test_differences_are_paired_by_seed_and_level(study, tmp_path):
    leave(study, tmp_path, {("grpo", 0.0): [0.5, 0.6], ("grpo", 0.5): [0.3, 0.35, 0.9], ("grpo", 1.0): [0.2]})
    results = read_results(study, tmp_path)
    claim, = [claim for claim in study.claims if claim.lower_noise == 0]
    found = differences(results, study, claim)  # of entropy, which is 1 - accuracy
    assert found == {0.5: pytest.approx([0.2, 0.25]), 1.0: pytest.approx([0.3])}
    rise, = [claim for claim in study.claims if claim.metric == "entropy_rise"]
    assert differences(results, study, rise) == {}
    leave(study, tmp_path, {("two_stage", 0.0): [0.5]})
    assert differences(read_results(study, tmp_path), study, rise) == {0.0: [0.5]}


def test_a_changed_configuration_is_refused_or_replaced(study, tmp_path):
    leave(study, tmp_path, {("vepo", 0.0): [0.5]})
    changed = read_study(CONFIG, overrides=["methods.vepo.overrides={algorithm.name: vepo, algorithm.keep: 0.3}"])
    with pytest.raises(ChangedConfiguration, match="1 finished .*seed0/noise0/vepo.*--redo"):
        unfinished(plan(changed), tmp_path, redo=False)
    left = [task.name for task in unfinished(plan(changed), tmp_path, redo=True)]
    assert "seed0/noise0/vepo" in left and "seed0/warmup" not in left and len(left) == 156
    assert len(unfinished(plan(study), tmp_path, redo=False)) == 155
    results = write_report(changed, tmp_path, tmp_path / "report", FACTS)
    assert not results.done and results.changed == ["seed0/noise0/vepo"]
    assert "seed0/noise0/vepo" in (tmp_path / "report/index.md").read_text().split("## Left out")[1].split("##")[0]


def test_tables_and_charts_hold_what_they_are_given():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.31, 0.44) == [0.32, 0.34, 0.36, 0.38, 0.4, 0.42, 0.44]
    panel = Panel("5 % <noise>", "step", "entropy", {"a&b": [(0.0, 1.0), (10.0, 2.0)], "c": [(0.0, 0.0)]})
    root = xml.etree.ElementTree.fromstring(chart("A title", [[panel], [panel]], ["a&b", "c"]))
    lines = [element.get("points") for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 4
    first, last = (tuple(map(float, point.split(","))) for point in lines[0].split())
    assert last[0] - first[0] == 300 and last[1] < first[1], "to the right, and up for more"
    assert "a&b" in [element.text for element in root.iter()]


def tiny_study(out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--workers", "1", *SMALL, "warmup.trainer.num_steps=3", "warmup.evaluation.stop_at={}",
            "run.trainer.num_steps=2", "run.data.check_frame=off", "run.evaluation.every=1", "data.train=16", "data.held_out=4",
            "data.validation=4", "warmup.data.prompts_per_step=4", "run.data.prompts_per_step=2",
            "checkpoint={family: qwen3_vl, hidden_size: 64, num_layers: 3, vision_depth: 3, min_pixels: 4096, "
            "max_pixels: 36864}", *more]


def test_a_small_study_runs_fails_where_it_must_and_goes_on(tmp_path, capsys):
    """A run that fails is recorded and the others go on; a second call does what is left, a third nothing."""
    out = tmp_path / "out"
    # a resolved configuration whose data a rank cannot read: it fails when it is run
    broken = "methods.ecvgpo_minus25.overrides={algorithm.name: ecvgpo, data.shards: [nowhere]}"
    assert main(tiny_study(out, broken)) == 1
    text = capsys.readouterr()
    assert "ecvgpo_minus25  FAILED" in text.out and "seed0/noise0/ecvgpo_minus25 failed" in text.err
    failure = json.loads((out / "seed0/noise0/ecvgpo_minus25/failure.json").read_text())
    assert "nowhere" in failure["error"] and not (out / "seed0/noise0/ecvgpo_minus25/result.json").exists()
    grpo = read_result(out / "seed0/noise0/grpo")
    assert grpo["curves"]["step"] == [1, 2] and grpo["evaluations"]["step"] == [0, 1, 2]
    assert len(grpo["curves"]["entropy/mean"]) == 2 and 0 <= grpo["final"]["acc_at_50"] <= 1
    assert read_result(out / "seed0/warmup")["num_parameters"] > 100_000
    assert not (out / "seed0/noise0/grpo/evaluation").exists() and (out / "seed0/noise0/grpo/log.txt").stat().st_size
    assert "failed" in (out / "report/index.md").read_text()

    # an interrupted run: its folder has metrics, but no result
    (out / "seed0/noise0/grpo/result.json").unlink()
    assert main(tiny_study(out)) == 0
    assert "1 of 3 trainings are done, 2 are left" in capsys.readouterr().out
    again = read_result(out / "seed0/noise0/grpo")
    assert again["final"] == grpo["final"] and again["key"] == grpo["key"]
    assert not (out / "seed0/noise0/ecvgpo_minus25/failure.json").exists()
    assert "**2 of 2 runs are done**" in (out / "report/index.md").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert main(tiny_study(out)) == 0 and main(["--out", str(out), "--report-only"]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} and len(stamps) == 3
    assert main(tiny_study(out, "run.optimizer.lr=2e-4")) == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_second_process_is_refused(tmp_path, capsys):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(tiny_study(tmp_path)) == 2
    assert "another process works on the study" in capsys.readouterr().err


def test_workers_end_with_a_killed_study(tmp_path):
    """Otherwise they would write into the folder that the next call works in."""
    study = subprocess.Popen([sys.executable, str(ROOT / "tools/entropy_study.py"), *tiny_study(tmp_path)],
                             stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "seed0/warmup/log.txt").exists():
            assert time.monotonic() < deadline and study.poll() is None
            time.sleep(0.1)
        workers = psutil.Process(study.pid).children(recursive=True)
    finally:
        study.kill()
        study.wait()
    assert workers and psutil.wait_procs(workers, timeout=20)[1] == []


def test_runs_of_a_failed_warm_up_are_given_up(study, tmp_path):
    tasks = plan(study)[:3]
    runner = Runner(tmp_path, tasks[1:], 1)
    runner.failed = {tasks[0].name: "no luck"}
    assert runner._next() is None and set(runner.failed) == {task.name for task in tasks}
    assert "starts from" in json.loads((tmp_path / tasks[1].name / "failure.json").read_text())["error"]
