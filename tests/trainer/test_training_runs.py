"""Real short trainings: what they leave behind, and that the layout does not matter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from megavg.trainer.config import parse_command_line, resolve
from tests.distributed import run_ranks
from tests.tiny_runs import all_finite, read_metrics, run_tree, train, training_lines
from tests.trainer.conftest import WARM

pytestmark = pytest.mark.slow

PER_STEP = {"step", "loss", "gradient_norm", "lr", "entropy/mean", "entropy/self_information", "response/length",
            "rollout/logprob_gap", "reward/mean", "reward/iou", "reward/format", "reward/parse_rate", "iou/mean",
            "reasons", "ecvgpo/alpha", "tokens", "tokens_per_second", "time/step", "time/data", "time/rollout",
            "time/reward", "time/score", "time/update", "memory/peak_gb"}


KL = ("algorithm.kl_coefficient=0.04", "trainer.export_hf=true", "evaluation.at_end=true")
"""A run with a frozen reference, an evaluation and an export: everything that pipeline stages have to share."""


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def load_in_transformers(folder):
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True)
    return model, {key: value for key, value in loading.items() if value}


def test_supervised_warm_up_learns_and_exports(warm_up, checkpoints):
    lines = training_lines(warm_up)
    assert [line["step"] for line in lines] == list(range(1, 61)) and all(map(all_finite, lines))
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"] and lines[-1]["entropy/mean"] < 0.5 * lines[0]["entropy/mean"]
    assert lines[0]["lr"] == pytest.approx(2e-3) and lines[4]["lr"] == pytest.approx(1e-2) and lines[-1]["lr"] < 1e-3
    assert not {"reward/mean", "rollout/logprob_gap"} & set(lines[0])
    model, problems = load_in_transformers(warm_up / "hf")
    assert not problems
    before = weights(checkpoints("qwen3_vl", **WARM))
    after = weights(warm_up / "hf")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert not list(warm_up.rglob("*.tmp"))


def test_metrics_are_complete(data_parallel):
    lines = training_lines(data_parallel / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert PER_STEP <= set(line) and all_finite(line)
        assert line["rollout/logprob_gap"] <= 1e-4 and line["tokens_per_second"] > 0
        assert 0 < line["iou/mean"] < 1 and 0 < line["reward/mean"] < 1.5 and line["gradient_norm"] > 0
        assert line["reward/mean"] == pytest.approx(line["reward/iou"] + 0.5 * line["reward/format"])
        assert sum(line["reasons"].values()) == 2 * 4 * 4, "two rewards for each answer of both ranks"


def test_evaluations_are_kept(data_parallel):
    folder = data_parallel / "whole"
    results = [json.loads((folder / "evaluation" / f"seen-{step:06d}.json").read_text()) for step in (0, 3)]
    for result, step in zip(results, (0, 3)):
        assert result["step"] == step and result["num_samples"] == len(result["rows"]) == 8
        assert len({row["key"] for row in result["rows"]}) == 8
        assert result["mean_iou"] == pytest.approx(sum(row["iou"] for row in result["rows"]) / 8)
    lines = [line for line in read_metrics(folder) if "eval/seen/acc_at_50" in line]
    assert [line["step"] for line in lines] == [0, 3]
    assert [line["eval/seen/mean_iou"] for line in lines] == [result["mean_iou"] for result in results]


def test_tensorboard_holds_scalars_and_the_pictures(data_parallel):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(data_parallel / "whole" / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"reward/mean", "reward/iou_mean", "entropy/mean", "policy/loss",
            "eval/seen/mean_iou"} <= set(tags["scalars"])
    lines = training_lines(data_parallel / "whole")
    events = board.Scalars("reward/mean")
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.value for event in events] == pytest.approx([line["reward/mean"] for line in lines])
    assert {"eval/seen", "train/answers"} <= set(tags["images"])
    assert [image.step for image in board.Images("eval/seen")] == [0, 3]
    names = {path.name for path in (data_parallel / "whole" / "pictures").iterdir()}
    assert names == {"eval_seen-000000.png", "eval_seen-000003.png", "train_answers-000002.png"}


def test_configurations_are_saved(data_parallel, grpo_tree):
    folder = data_parallel / "whole"
    config = parse_command_line(["--config", str(folder / "config.yaml")])
    assert config.tree() == yaml.safe_load((folder / "config.yaml").read_text())
    assert config.trainer.save_every == 3 and config.algorithm_name == "ecvgpo"
    deepspeed = json.loads((folder / "deepspeed_config.json").read_text())
    assert deepspeed["zero_optimization"]["stage"] == 3
    assert deepspeed["gradient_clipping"] == config.optimizer.gradient_clipping and not deepspeed["bf16"]["enabled"]


def test_the_export_loads_in_transformers(data_parallel):
    _, problems = load_in_transformers(data_parallel / "whole" / "hf")
    assert not problems


def one_process_runs(trees: dict[str, dict]) -> None:
    for tree in trees.values():
        train(tree)


@pytest.fixture(scope="module")
def one_process(grpo_tree, checkpoints, few_scenes, tmp_path_factory):
    """Folder of several runs on one process."""
    folder = tmp_path_factory.mktemp("one_process")
    older = folder / "replaced" / "checkpoints" / "step-000009"
    older.mkdir(parents=True)
    (older / "trainer_state.json").write_text("{}")
    (folder / "replaced" / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    goal = ("evaluation.every=1", "evaluation.stop_at={seen: 0.01}", "trainer.save_every=1")
    run_ranks(1, one_process_runs, {
        "goal": grpo_tree(folder / "goal", *goal),
        "goal_resumed": grpo_tree(folder / "goal", *goal, "trainer.resume=true"),
        "plain": grpo_tree(folder / "plain", "evaluation.at_end=true"),
        "twice": grpo_tree(folder / "twice", "trainer.updates_per_batch=2", "trainer.num_steps=1"),
        "kl": grpo_tree(folder / "kl", *KL),
        "greedy": grpo_tree(folder / "greedy", "rollout.temperature=0", "trainer.num_steps=1"),
        "replaced": grpo_tree(folder / "replaced", "trainer.overwrite=true", "trainer.num_steps=1"),
        "bf16": grpo_tree(folder / "bf16", "model.dtype=bfloat16", "trainer.num_steps=2", "trainer.export_hf=true"),
        "untrained": run_tree(checkpoints("qwen3_vl"), few_scenes, folder / "untrained", "trainer.num_steps=2",
                              "trainer.export_hf=true"),
    })
    return folder


def test_two_ranks_do_what_one_does(data_parallel, one_process):
    """Same prompts, same answers, same rewards, same loss."""
    for two, one in zip(training_lines(data_parallel / "whole"), training_lines(one_process / "plain"), strict=True):
        assert two["tokens"] == one["tokens"] and two["reasons"] == one["reasons"]
        for name in ("loss", "reward/mean", "iou/mean", "entropy/mean", "entropy/self_information", "response/length",
                     "ecvgpo/weight_mean", "ecvgpo/weight_at_bounds"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    two, one = (json.loads((folder / "evaluation" / "seen-000003.json").read_text())
                for folder in (data_parallel / "whole", one_process / "plain"))
    assert {row["key"]: row["text"] for row in two["rows"]} == {row["key"]: row["text"] for row in one["rows"]}


def test_a_training_ends_at_its_goal_and_stays_there(one_process):
    """Also when it is resumed: the goal was reached by the process before."""
    assert [line["step"] for line in training_lines(one_process / "goal")] == [1]


def test_kl_to_the_reference_starts_at_zero(one_process):
    lines = training_lines(one_process / "kl")
    assert 0 <= lines[0]["kl/reference"] < 1e-9
    assert lines[0]["kl/reference"] < 1e-4 < lines[1]["kl/reference"] and all(map(all_finite, lines))
    assert "kl/reference" not in training_lines(one_process / "plain")[0]


def test_a_second_update_on_the_same_answers_goes_on_downhill(one_process):
    once, twice = (training_lines(one_process / name)[0] for name in ("plain", "twice"))
    assert twice["reasons"] == once["reasons"] and twice["loss"] < once["loss"] - 1e-4


def test_overwrite_starts_anew(one_process):
    assert [line["step"] for line in read_metrics(one_process / "replaced")] == [1]
    assert not (one_process / "replaced" / "checkpoints").exists()


def test_bfloat16(one_process):
    lines = training_lines(one_process / "bf16")
    assert len(lines) == 2 and all(map(all_finite, lines)) and lines[0]["gradient_norm"] > 0
    assert {tensor.dtype for tensor in weights(one_process / "bf16" / "hf").values()} == {torch.bfloat16}


def test_equal_rewards_leave_the_model_alone(one_process, checkpoints):
    """An untrained model earns nothing: every advantage is zero, and so are loss and gradient, without NaN."""
    lines = training_lines(one_process / "untrained")
    assert all(line["reward/mean"] == 0 for line in lines)
    assert all(line["loss"] == 0 and line["gradient_norm"] == 0 and all_finite(line) for line in lines)
    before, after = weights(checkpoints("qwen3_vl")), weights(one_process / "untrained" / "hf")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_greedy_rollouts_are_all_alike(one_process):
    line, = training_lines(one_process / "greedy")
    assert line["loss"] == 0 and line["rollout/logprob_gap"] <= 1e-4
    assert all(count % 4 == 0 for count in line["reasons"].values())


def train_all(trees: list[dict]) -> None:
    for tree in trees:
        train(tree)


@pytest.fixture(scope="module")
def tensor_parallel(warm_up, few_scenes, grpo_tree, tmp_path_factory):
    """Folder of a supervised run and an ECVGPO run from it on 2 tensor-parallel ranks, and of runs with a reference."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    layout = "parallel.tensor_model_parallel_size=2"
    supervised = run_tree(warm_up / "hf", few_scenes, folder / "sft", "algorithm={name: sft}", layout,
                          "trainer.export_hf=true")
    after = grpo_tree(folder / "ecvgpo", layout, f"model.path={folder / 'sft' / 'hf'}", "trainer.export_hf=true")
    run_ranks(2, train_all, [supervised, after, grpo_tree(folder / "kl_tp", layout, *KL),
                             grpo_tree(folder / "kl_dp", *KL)])
    return folder


def test_tensor_parallel_training(tensor_parallel):
    folder = tensor_parallel
    for name in ("sft", "ecvgpo"):
        lines = training_lines(folder / name)
        assert [line["step"] for line in lines] == [1, 2, 3] and all(map(all_finite, lines))
        assert not load_in_transformers(folder / name / "hf")[1]
    assert PER_STEP <= set(lines[0]) and all(line["rollout/logprob_gap"] <= 1e-4 for line in lines)


@pytest.mark.parametrize("layout", ["kl_tp", "kl_dp"])
def test_the_reference_is_the_same_in_every_layout(tensor_parallel, one_process, layout):
    """A frozen copy under ZeRO-3 over two data-parallel, or split over two tensor-parallel, ranks."""
    ours, alone = training_lines(tensor_parallel / layout), training_lines(one_process / "kl")
    assert alone[-1]["kl/reference"] > 1e-6  # it has moved away
    for two, one in zip(ours, alone, strict=True):
        assert two["kl/reference"] == pytest.approx(one["kl/reference"], abs=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def pipeline(grpo_tree, tmp_path_factory):
    """Folder of a run on 2 pipeline stages, with recomputation and micro-batches by tokens, and of its resumption."""
    folder = tmp_path_factory.mktemp("pipeline")
    options = ("parallel.pipeline_model_parallel_size=2", "parallel.recompute=true", "trainer.micro_batch_tokens=150",
               "head.skip_mass=1e-7", "trainer.save_every=2", *KL)
    run_ranks(2, pipeline_runs, [grpo_tree(folder / "run", *options),
                                 grpo_tree(folder / "run", *options, "trainer.resume=true", "trainer.num_steps=4")])
    return folder / "run"


def pipeline_runs(trees: list[dict]) -> None:
    for tree in trees:
        train(tree)
        results = Path(tree["trainer"]["output_dir"], "evaluation")
        if dist.get_rank() == 0:  # the resumption takes the third step again, and clears its results away
            shutil.copytree(results, results.parent.parent / "results", dirs_exist_ok=True)
        dist.barrier()


def test_pipeline_stages_do_what_one_process_does(pipeline, one_process):
    ours, alone = training_lines(pipeline), training_lines(one_process / "kl")
    assert [line["step"] for line in ours] == [1, 2, 3, 4]  # the fourth after the resumption
    for two, one in zip(ours, alone):
        assert PER_STEP <= set(two) and all_finite(two)
        assert two["tokens"] == one["tokens"] and two["reasons"] == one["reasons"]
        assert two["rollout/logprob_gap"] <= 1e-4 and two["head/dropped_mass"] < 1e-3
        for name in ("loss", "reward/mean", "entropy/mean", "entropy/self_information", "kl/reference"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    two, one = (json.loads((folder / "seen-000003.json").read_text())
                for folder in (pipeline.parent / "results", one_process / "kl" / "evaluation"))
    assert not (pipeline / "evaluation" / "seen-000003.json").exists()
    assert {row["key"]: row["text"] for row in two["rows"]} == {row["key"]: row["text"] for row in one["rows"]}


def test_pipeline_stages_export_the_whole_model(pipeline, warm_up):
    assert not load_in_transformers(pipeline / "hf")[1]
    before, after = weights(warm_up / "hf"), weights(pipeline / "hf")
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


def test_resolved_trees_are_what_the_command_line_gives(grpo_tree, tmp_path):
    tree = grpo_tree(tmp_path / "out")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert parse_command_line(["--config", str(path)]) == resolve(tree)
