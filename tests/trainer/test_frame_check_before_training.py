"""A mistake of the frame in a configuration ends the run before its first step; a model that answers well goes on."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, training_lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHECK = ("data.check_frame=stop", "trainer.num_steps=1", "evaluation.sets={}")


def run_commands(trees: dict[str, dict], folder: str) -> dict[str, tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the training's entry point for each tree, on this process."""
    from megavg.train import main

    found = {}
    for name, tree in trees.items():
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(["--config", str(path)])
        found[name] = code, output.getvalue(), errors.getvalue()
    return found


@pytest.fixture(scope="module")
def runs(warm_up, checkpoints, few_scenes, grpo_tree, tmp_path_factory):
    """(folder, name -> outcome) of runs from a model that answers the scenes it was trained on in its own frame."""
    folder = tmp_path_factory.mktemp("frames")

    def sft(name, *overrides):
        return grpo_tree(folder / name, *CHECK, "algorithm={name: sft}", *overrides)

    planted, untrained = "model.box_format=json_resized_px", checkpoints("qwen3_vl")
    trees = {
        "right": grpo_tree(folder / "right", *CHECK),
        "planted": grpo_tree(folder / "planted", *CHECK, planted),
        "planted_sft": sft("planted_sft", planted),
        "planted_tokens": grpo_tree(folder / "planted_tokens", *CHECK, "model.box_format=tokens_relative_1000"),
        "warned": grpo_tree(folder / "warned", *CHECK, planted, "data.check_frame=warn"),
        "off": grpo_tree(folder / "off", *CHECK, planted, "data.check_frame=off"),
        "noisy": grpo_tree(folder / "noisy", *CHECK, "data.noise.probability=1.0"),
        "untrained": run_tree(untrained, few_scenes, folder / "untrained", *CHECK),
        "untrained_sft": run_tree(untrained, few_scenes, folder / "untrained_sft", *CHECK, "algorithm={name: sft}"),
        "thoughts": sft("thoughts", "data.thinking=true"),
        "resumed": grpo_tree(folder / "off", *CHECK, planted, "trainer.resume=true", "trainer.num_steps=2"),
    }
    trees["off"]["trainer"]["save_every"] = 1
    return folder, run_ranks(1, run_commands, trees, str(folder), timeout=600)[0]


def test_a_planted_frame_mistake_is_caught_before_training_starts(runs):
    folder, outcomes = runs
    for name in ("planted", "planted_sft"):
        code, _, errors = outcomes[name]
        told = errors[errors.index("error: frame check: "):]
        assert code == 2 and "Traceback" not in errors
        assert "the starting model answers in another frame than this run reads" in told
        assert told.count(", answered ") == 3 and "bbox_2d" in told and "<- model.box_format=json_resized_px" in told
        assert "set model.box_format=json_relative_1000; data.check_frame=off goes on all the same" in told
        assert not (folder / name).exists(), "no step was taken, and nothing lies in the way of the next try"


def test_a_format_of_the_other_kind_is_caught_too(runs):
    code, _, errors = runs[1]["planted_tokens"]
    assert code == 2 and "set model.box_format=json_relative_1000;" in errors
    assert "answers are written as JSON, which this run, reading box tokens, cannot read" in errors


def test_the_right_frame_trains_and_the_log_has_the_table(runs):
    folder, outcomes = runs
    code, output, _ = outcomes["right"]
    assert code == 0 and len(training_lines(folder / "right")) == 1
    assert "frame check: no other frame fits" in output and "mean IoU  read as" in output
    assert "pixels of the resized image" in output and "To mend it" not in output


def test_wrong_labels_do_not_mislead_it(runs):
    code, output, _ = runs[1]["noisy"]
    assert code == 0 and "frame check: no other frame fits" in output


def test_warn_and_off_go_on(runs):
    folder, outcomes = runs
    for name in ("warned", "off"):
        assert outcomes[name][0] == 0 and len(training_lines(folder / name)) >= 1
    assert "in another frame than this run reads" in outcomes["warned"][1]
    assert "frame check" not in outcomes["off"][1] + outcomes["off"][2]


def test_a_resumed_run_is_not_checked_again(runs):
    code, output, _ = runs[1]["resumed"]
    assert code == 0 and "resumed after step 1" in output and "frame check" not in output


def test_a_model_that_answers_nothing_stops_what_learns_from_its_answers(runs):
    folder, outcomes = runs
    code, _, errors = outcomes["untrained"]
    assert code == 2 and "the starting model's answers do not parse as json_relative_1000" in errors
    assert "algorithm.name=sft" in errors and not (folder / "untrained").exists()
    code, output, _ = outcomes["untrained_sft"]
    assert code == 0 and "frame check: the starting model's answers do not parse" in output
    assert len(training_lines(folder / "untrained_sft")) == 1


def test_thoughts_that_are_missing_are_told_at_the_start(runs):
    folder, outcomes = runs
    code, _, errors = outcomes["thoughts"]
    assert code == 2 and 'has no "thought", which supervised fine-tuning with data.thinking=true learns' in errors
    assert not (folder / "thoughts").exists()


def test_the_exact_prompt_is_in_the_log_and_in_the_folder(runs):
    folder, outcomes = runs
    output = outcomes["right"][1]
    assert output.count("prompt of rec (data.prompt): 'Locate {expression}.'") == 1
    line, = [line for line in output.splitlines() if "the first prompt as the model reads it" in line]
    assert "<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Locate the " in line
    assert line.endswith("<|im_end|>\\n<|im_start|>assistant\\n'")
    assert yaml.safe_load((folder / "right" / "prompts.yaml").read_text())["rec"] == "Locate {expression}."


def in_a_layout(config: dict, shards: str, tensor: int, pipeline: int) -> tuple[list, list[str]]:
    """(what the check sees on this rank, the samples that it asks for)."""
    from megavg.parallel.mcore import make_context, start_processes
    from megavg.protocols.options import LabelNoise
    from megavg.trainer.answering import LoadedModel
    from megavg.trainer.collect import make_source
    from megavg.trainer.config import DataConfig, ModelConfig
    from megavg.trainer.frame_check import check_frame, known_samples

    context = make_context(tensor, pipeline, start_processes())
    model = LoadedModel(ModelConfig(**config), context, 4)
    source = make_source(DataConfig([shards]), 8, 0, context, LabelNoise())
    samples = known_samples(source.next_batch, 8, context)
    report = check_frame(model, samples, lambda sample: f"Locate {sample.expression}.", 32, context)
    return sorted(report.looks, key=lambda look: look.key), [sample.key for sample in samples]


def test_every_layout_sees_the_same(warm_up, few_scenes):
    config = {"path": str(warm_up / "hf"), "dtype": "float32"}
    (alone, keys), = run_ranks(1, in_a_layout, config, str(few_scenes), 1, 1)
    (data_0, keys_0), (data_1, keys_1) = run_ranks(2, in_a_layout, config, str(few_scenes), 1, 1)
    (tensor_0, both), _ = run_ranks(2, in_a_layout, config, str(few_scenes), 2, 1)
    (stage_0, _), (stage_1, whole) = run_ranks(2, in_a_layout, config, str(few_scenes), 1, 2)
    assert len(set(keys)) == 8 and sorted(keys_0 + keys_1) == sorted(keys) == sorted(both) == sorted(whole)
    assert alone == data_0 == data_1 == tensor_0 == stage_0 == stage_1


def test_the_tool(warm_up, few_scenes):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/check_frame.py", "--shards", str(few_scenes), "--samples", "8", "--dtype",
                   "float32", "--prompt", "Locate {expression}.", "--max-new-tokens", "32", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "DS_ACCELERATOR": "cpu"})

    right = run("--model", str(warm_up / "hf"))
    assert right.returncode == 0 and "frame check: no other frame fits" in right.stdout, right.stderr
    wrong = run("--model", str(warm_up / "hf"), "--box-format", "json_resized_px")
    assert wrong.returncode == 1 and "set model.box_format=json_relative_1000" in wrong.stdout, wrong.stderr
    missing = run("--model", str(few_scenes))
    assert missing.returncode == 2 and "config.json is missing" in missing.stderr
