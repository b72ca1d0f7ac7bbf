"""megavg/evaluate.py on a model that was trained for some seconds: every layout, a kill in the middle, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megavg.data.scenes import scenes
from megavg.data.writer import write_shards
from megavg.protocols.config import apply_overrides
from tests.distributed import run_ranks
from tests.trainer.test_bad_input import change_member

pytestmark = pytest.mark.slow

EVALUATE = Path(__file__).resolve().parents[2] / "megavg" / "evaluate.py"
LAYOUTS = {"dp": (), "tp": ("parallel.tensor_model_parallel_size=2",),
           "pp": ("parallel.pipeline_model_parallel_size=2",)}
IN_THE_WAY = {"results": "results.json.tmp", "pictures": "objects/worst.png.tmp", "rows": "objects/rows.jsonl.tmp"}
FULL_AT = 500  # bytes: some answers, not all
COUNT = 7  # a prime: no number of ranks divides it


def evaluate(trees: list[dict]) -> list[dict]:
    """Evaluations on this process, which is one rank of a world that is already there."""
    from megavg.trainer.evaluate_config import resolve
    from megavg.trainer.evaluation_run import EvaluationRun

    return [EvaluationRun(resolve(tree)).run() for tree in trees]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, list[str]]:
    """Shards of scenes that the model has learnt: as two RefCOCO splits, as ScreenSpot, as a detection."""
    folder = tmp_path_factory.mktemp("sets")
    known = list(scenes(8, seed=0))[:COUNT]
    splits = [dataclasses.replace(sample, meta={"dataset": "refcoco", "split": "val" if i % 3 else "testA"})
              for i, sample in enumerate(known)]
    points = [dataclasses.replace(sample, task="point", meta={
        "platform": "web" if i % 2 else "mobile", "data_type": "icon" if i > 3 else "text"})
        for i, sample in enumerate(known)]
    objects = [dataclasses.replace(sample, task="detection", expression="shape", labels=("shape",) * len(
        sample.boxes_xyxy_px)) for sample in known[:2]]
    empty = dataclasses.replace(known[2], key="empty", task="detection", boxes_xyxy_px=(), labels=())
    for name, samples in (("refcoco", splits), ("screens", points), ("objects", [*objects, empty])):
        write_shards(samples, str(folder / name), name, 4)
    return {name: [str(folder / name)] for name in ("refcoco", "screens", "objects")}


@pytest.fixture(scope="module")
def tree_of(warm_up, sets):
    """``tree_of(output_dir, *overrides)``: the configuration of an evaluation of the warmed-up model."""
    def make(output_dir: Path, *overrides: str) -> dict:
        return apply_overrides({
            "model": {"path": str(warm_up / "hf"), "dtype": "float32"},
            "data": {"prompt": "Locate {expression}."},
            "generation": {"max_new_tokens": 32, "prompts_per_pass": 2},
            "evaluation": {"sets": dict(sets), "output_dir": str(output_dir), "worst": 4},
        }, list(overrides))

    return make


def messages_of(wrong: dict[str, dict]) -> dict[str, str]:
    """What those evaluations say that must not go through."""
    messages = {}
    for name, tree in wrong.items():
        with pytest.raises(ValueError) as caught:
            evaluate([tree])
        messages[name] = str(caught.value)
    return messages


def evaluate_as_in_training(tree: dict, name: str) -> tuple[dict, list[dict]]:
    """(result, rows) of a set as the trainer's own evaluation has them."""
    from megavg.trainer.evaluate_config import resolve
    from megavg.trainer.evaluation_run import EvaluationRun
    from megavg.trainer.evaluator import Evaluator

    run = EvaluationRun(resolve(tree))
    evaluator = Evaluator(run.model, run.context, run.prompts.question, run.config.generation.max_new_tokens, 2)
    return evaluator.run(name, run.shards[name])[:2]


def one_process_runs(trees: list[dict], wrong: dict[str, dict]):
    """What evaluations return, the messages of those that must not go through, and the trainer's own evaluation."""
    return evaluate(trees), messages_of(wrong), evaluate_as_in_training(trees[0], "objects")


def evaluate_on_a_full_disk(tree: dict) -> str:
    """The message of an evaluation whose first process can write no file beyond some bytes, as the system has it."""
    import contextlib
    import io
    import resource

    from megavg.trainer.evaluate_config import resolve
    from megavg.trainer.evaluation_run import EvaluationRun

    run, before = EvaluationRun(resolve(tree)), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if run.is_first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, before[1]))
        # what is printed may go to a file too, which is beyond its bytes already
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ValueError) as caught:
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return str(caught.value)


def two_rank_runs(trees: list[dict], wrong: dict[str, dict], full: dict):
    """As ``one_process_runs``; and the message on a full disk, with the result when the disk has room again."""
    return (evaluate(trees), messages_of(wrong), evaluate_as_in_training(trees[0], "objects"),
            evaluate_on_a_full_disk(full), evaluate([full]))


@pytest.fixture(scope="module")
def one_process(tree_of, sets, tmp_path_factory):
    """(folder of an evaluation on one process, what it returned, what a second run there and one of a part returned,
    messages of mistakes, the set ``objects`` as the trainer's own evaluation has it)."""
    folder = tmp_path_factory.mktemp("one") / "out"
    part = tree_of(folder.with_name("part"), "evaluation.limit=3", "evaluation.worst=0")
    part["evaluation"]["sets"] = {
        "testA": {"shards": sets["refcoco"], "where": {"split": "testA"}, "group_by": ["split"]},
        "as_points": {"shards": sets["refcoco"], "task": "point"}}
    wrong = {name: tree for name, (tree, _) in mistakes(tree_of, folder, sets, folder.with_name("wrong")).items()}
    (results, messages, in_training), = run_ranks(
        1, one_process_runs, [tree_of(folder), tree_of(folder), part], wrong, timeout=600)
    return folder, *results, messages, in_training


@pytest.fixture(scope="module")
def killed(tree_of, tmp_path_factory):
    """(folder of an evaluation on one process that was killed in its first set, what was in the file of answers)."""
    folder = tmp_path_factory.mktemp("killed")
    answers = folder / "out" / "refcoco" / "answers" / "rank-00000.jsonl"
    tree = tree_of(folder / "out", "generation.prompts_per_pass=1")
    return folder / "out", killed_after_some(tree, folder / "run.yaml", answers)


@pytest.fixture(scope="module")
def two_ranks(tree_of, killed, sets, tmp_path_factory):
    """(folder, results of evaluations there on two processes: each layout, with a broken picture; the killed one;
    of each rank messages of mistakes, the trainer's own evaluation, what a full disk gave)."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(sets["refcoco"][0], folder / "shards")
    change_member(folder / "shards" / "refcoco-000000.tar", ".png", lambda data: data[:len(data) // 2])
    trees = {name: tree_of(folder / name, *layout) for name, layout in LAYOUTS.items()}
    for name in ("tp", "pp"):
        trees[name]["evaluation"]["sets"] = {name: sets[name] for name in ("refcoco", "objects")}
    trees["broken"] = tree_of(folder / "broken", f"evaluation.sets={{refcoco: [{folder / 'shards'}]}}",
                              "data.on_error=skip")
    with (killed[0] / "refcoco" / "answers" / "rank-00000.jsonl").open("ab") as file:
        file.write(b'{"shard": "torn')  # as a kill between two blocks of the file would leave it
    trees["killed"] = tree_of(killed[0])
    wrong = {name: tree_of(folder / name, f"evaluation.sets={{objects: {sets['objects']}}}") for name in IN_THE_WAY}
    for name, file in IN_THE_WAY.items():
        (folder / name / file).mkdir(parents=True)  # a folder where a file has to be written
    full = tree_of(folder / "full", f"evaluation.sets={{refcoco: {sets['refcoco']}}}", *LAYOUTS["tp"])
    ranks = run_ranks(2, two_rank_runs, list(trees.values()), wrong, full, timeout=900)
    return folder, dict(zip(trees, ranks[0][0])), [rank[1:] for rank in ranks]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "answered_now", "answered_before")}


def results_of(folder: Path) -> dict:
    return {name: without_clock(result) for name, result in
            json.loads((folder / "results.json").read_text())["sets"].items()}


def test_every_sample_is_answered_once_and_the_model_knows_something(one_process):
    folder, results, *_ = one_process
    for name, count in (("refcoco", COUNT), ("screens", COUNT), ("objects", 3)):
        rows = lines(folder / name / "rows.jsonl")
        assert len(rows) == len({(row["shard"], row["key"]) for row in rows}) == count == results[name]["num_samples"]
        assert results[name]["indexed"] == count and results[name]["skipped"] == 0
        assert results[name]["answered_now"] == count
    assert results["refcoco"]["acc_at_50"] > 0.3 and results["screens"]["accuracy"] > 0.3
    assert results["refcoco"]["parse_rate"] == 1 and results["objects"]["unlabelled_boxes"] > 0
    assert not list(folder.rglob("*.tmp"))


def test_the_tables_are_there(one_process):
    folder, results, *_ = one_process
    content = json.loads((folder / "results.json").read_text())
    assert [(part["split"], part["num_samples"]) for part in content["refcoco"]] == [("val", 4), ("testA", 3)]
    rows = lines(folder / "refcoco" / "rows.jsonl")
    val = [row["iou"] > 0.5 for row in rows if row["meta"]["split"] == "val"]
    assert content["refcoco"][0]["acc_at_50"] == sum(val) / 4
    assert len(content["sets"]["screens"]["screenspot"]["cells"]) == 4
    text = (folder / "results.md").read_text()
    for part in ("| refcoco val |", "Micro average (over samples)", "[worst.png](screens/worst.png)",
                 "Locate {expression}", "mAP is not on one scale"):
        assert part in text
    assert content["about"]["versions"]["megavg"] and content["about"]["configuration"]["evaluation"]["worst"] == 4


def test_worst_cases_come_worst_first_and_are_drawn(one_process):
    folder, *_ = one_process
    rows, worst = lines(folder / "refcoco" / "rows.jsonl"), lines(folder / "refcoco" / "worst.jsonl")
    assert [row["iou"] for row in worst] == sorted(row["iou"] for row in rows)[:4]
    for name in ("refcoco", "screens", "objects"):
        with Image.open(folder / name / "worst.png") as picture:
            assert picture.width > 400


def test_a_second_run_answers_nothing_and_says_the_same(one_process):
    _, first, second, *_ = one_process
    assert all(result["answered_now"] == 0 and result["answered_before"] == result["num_samples"]
               for result in second.values())
    assert {name: without_clock(result) for name, result in first.items()} == {
        name: without_clock(result) for name, result in second.items()}


def test_where_limit_and_task(one_process):
    folder, _, _, part, *_ = one_process
    assert part["testA"]["num_samples"] == 3 and part["as_points"]["num_samples"] == 3
    assert [group["split"] for group in part["testA"]["groups"]] == ["testA"]
    assert part["as_points"]["task"] == "point" and part["as_points"]["files"] == ["rows.jsonl"]
    assert {row["meta"]["split"] for row in lines(folder.with_name("part") / "testA" / "rows.jsonl")} == {"testA"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(two_ranks, one_process, layout):
    ours, alone = two_ranks[0] / layout, one_process[0]
    found, expected = results_of(ours), results_of(alone)
    assert list(found) == (list(expected) if layout == "dp" else ["refcoco", "objects"])
    for name in found:
        assert (ours / name / "rows.jsonl").read_bytes() == (alone / name / "rows.jsonl").read_bytes()
        assert found[name] == expected[name]
    counts = [len(lines(path)) for path in sorted((ours / "refcoco" / "answers").iterdir())]
    assert counts == ([4, 3] if layout == "dp" else [7])


def test_the_evaluation_in_a_training_says_the_same_on_any_number_of_ranks(two_ranks, one_process):
    """COCO's mAP breaks ties by the order of the pictures, so the rows must come in that order from everywhere."""
    expected, rows = one_process[5]
    alone = lines(one_process[0] / "objects" / "rows.jsonl")
    assert rows == alone and len(rows) == 3
    for _, (result, ours), *_ in two_ranks[2]:
        assert ours == rows and result == expected


def test_what_the_disk_refuses_ends_all_ranks_with_one_message(two_ranks):
    folder = two_ranks[0]
    for messages, *_ in two_ranks[2]:
        for name, file in IN_THE_WAY.items():
            assert messages[name].startswith(f"cannot go on in {(folder / name / file).parent} ([Errno ") and \
                   messages[name].endswith("give the same command again: what is answered stays"), messages[name]


def test_a_full_disk_ends_all_ranks_of_a_model_and_nothing_is_lost(two_ranks, one_process):
    folder = two_ranks[0] / "full"
    for _, _, message, _ in two_ranks[2]:
        assert f"cannot go on in {folder / 'refcoco'} ([Errno 27]" in message and "answers what is missing" in message
    result = two_ranks[2][0][3][0]["refcoco"]
    assert 0 < result["answered_before"] < COUNT == result["num_samples"]
    assert (folder / "refcoco" / "rows.jsonl").read_bytes() == (one_process[0] / "refcoco" / "rows.jsonl").read_bytes()


def start(tree: dict, path: Path) -> subprocess.Popen:
    path.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(EVALUATE), "--config", str(path)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_after_some(tree: dict, path: Path, answers: Path) -> bytes:
    """Start an evaluation and kill it once some answers are on the disk; what is there then."""
    process = start(tree, path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if answers.is_file() and answers.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return answers.read_bytes()


def test_killed_and_finished_in_another_layout(killed, two_ranks, one_process):
    (out, before), folder, result = killed, one_process[0], two_ranks[1]["killed"]["refcoco"]
    num_before = before.count(b"\n")
    assert 2 <= num_before < COUNT, "killed too early or too late"
    assert (result["answered_before"], result["answered_now"]) == (num_before, COUNT - num_before)
    whole = (out / "refcoco" / "answers" / "rank-00000.jsonl").read_bytes()
    assert whole.startswith(before[:before.rfind(b"\n") + 1]) and b"torn" not in whole
    for name in ("refcoco", "screens", "objects"):
        assert (out / name / "rows.jsonl").read_bytes() == (folder / name / "rows.jsonl").read_bytes()
    assert results_of(out) == results_of(folder)


def mistakes(tree_of, done: Path, sets: dict, folder: Path) -> dict[str, tuple[dict, str]]:
    """name -> (configuration, what the message must hold)."""
    copy = folder / "copied"
    folder.mkdir(exist_ok=True)
    shutil.copytree(sets["refcoco"][0], copy)
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["num_samples"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    return {
        "another prompt": (tree_of(done, "data.prompt=Find {expression}."),
                           "holds answers of another evaluation (prompts"),
        "another length": (tree_of(done, "generation.max_new_tokens=33"), "max_new_tokens was 32, is 33); choose "
                           "another evaluation.output_dir, or set evaluation.overwrite=true"),
        "another index": (tree_of(folder / "index", f"evaluation.sets={{a: [{copy}]}}"),
                          "holds 4 records, but the index.json beside it says 5"),
        "no such shards": (tree_of(folder / "none", "evaluation.sets={a: [nowhere/*.tar]}"), "no shard matches"),
        "another benchmark": (tree_of(folder / "bench", f"evaluation.sets={{a: {{shards: {sets['refcoco']}, "
                                      "benchmark: screenspot}}"), "screenspot takes samples of task 'point'"),
        "nothing fits": (tree_of(folder / "where", f"evaluation.sets={{a: {{shards: {sets['refcoco']}, where: "
                                 "{split: testC}}}"), "hold no usable sample that fits where={'split': 'testC'}"),
        "another task": (tree_of(folder / "task", f"evaluation.sets={{a: {{shards: {sets['objects']}, task: point}}}}"),
                         "is of task 'detection', but the set's task: point takes samples of rec and point alone"),
        "layout": (tree_of(folder / "layout", "parallel.tensor_model_parallel_size=2"),
                   "world size 1 is not divisible"),
    }


def test_mistakes_are_told_and_change_nothing(tree_of, one_process, sets, tmp_path):
    folder, messages = one_process[0], one_process[4]
    for name, (_, expected) in mistakes(tree_of, folder, sets, tmp_path).items():
        assert expected in messages[name], name
    assert json.loads((folder / "refcoco" / "fingerprint.json").read_text())["max_new_tokens"] == 32


def test_broken_records_are_left_out_and_counted(two_ranks, one_process):
    """Just one of the two ranks sees the broken picture."""
    folder, result = two_ranks[0] / "broken", two_ranks[1]["broken"]["refcoco"]
    assert (result["num_samples"], result["skipped"], result["skipped_reasons"]) == (6, 1, {"broken image": 1})
    expected = [row["text"] for row in lines(one_process[0] / "refcoco" / "rows.jsonl")[1:]]
    assert [row["text"] for row in lines(folder / "refcoco" / "rows.jsonl")] == expected
    assert "Left out as unusable: broken image 1." in (folder / "results.md").read_text()


def test_the_command(tree_of, one_process, sets, tmp_path):
    """From the shell: the table comes last, and overwrite answers again."""
    shutil.copytree(one_process[0], tmp_path / "out")
    tree = tree_of(tmp_path / "out", "evaluation.limit=2", "generation.max_new_tokens=8", "evaluation.overwrite=true",
                   f"evaluation.sets={{refcoco: {sets['refcoco']}}}")
    process = start(tree, tmp_path / "run.yaml")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (tmp_path / "out" / "results.md").read_text() in out and "| refcoco |" in out
    assert "prompt of rec (data.prompt): 'Locate {expression}.'" in out
    first = lines(tmp_path / "out" / "refcoco" / "rows.jsonl")[0]
    shown = next(line for line in out.splitlines() if "the first prompt as the model reads it" in line)
    assert first["key"] in shown and f"Locate {first['expression']}." in shown and "<|im_start|>user" in shown
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["refcoco"]["answered_now"] == 2


def test_help_comes_at_once():
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-X", "importtime", str(EVALUATE), "--help"], capture_output=True,
                           text=True)
    assert shown.returncode == 0 and "--config" in shown.stdout and "torch" not in shown.stderr
    assert time.monotonic() - started < 20
