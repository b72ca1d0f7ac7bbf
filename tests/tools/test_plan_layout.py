"""The planner of layouts: its sizes are those of the released models, its formulas those of a generator that ran."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavg.protocols.options import SamplingParams
from megavg.trainer.config import parse_command_line
from tests.distributed import run_ranks
from tools.layouts import Layout
from tools.plan_layout import configuration, main, predictor_of, released
from tools.plan_search import Machine, best, fewest_gpus, predictions, remedies
from tools.plan_work import Work

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS, NUM_ANSWERS, NEW_TOKENS = 3, 2, 5
TINY = {"qwen2_5_vl": {"num_kv_heads": 1},  # one head is copied over two ranks
        "qwen3_vl": {"tie_embeddings": True, "vision_depth": 2, "num_layers": 4}}  # its first two layers stay together


@pytest.fixture(scope="module")
def small():
    """The predictor of a released model; its tower is made once."""
    return predictor_of("Qwen/Qwen2.5-VL-7B-Instruct")


@pytest.mark.parametrize("name", sorted(released()))
def test_released_models_have_as_many_parameters_as_published(name):
    found = predictor_of(name).predict(Layout(1, 1, 1), Work(dtype="float32")).kinds["parameters"] / 4
    assert found == released()[name].get("parameters", found) and found == int(found)


def test_copy_and_cache_are_as_measured(checkpoints):
    folders = {family: str(checkpoints(family, **fields)) for family, fields in TINY.items()}
    for rank in run_ranks(2, _measure, folders):
        for case, found in rank.items():
            assert found["measured"] == found["predicted"], case


def _measure(folders: dict[str, str]) -> dict:
    """Bytes of the generator's weights and cache on this rank, beside the prediction."""
    from megavg.models.base import load_model
    from megavg.parallel.mcore import make_context

    return {(family, tp): _measure_one(folder, load_model(folder), make_context(tp, 2 // tp, torch.device("cpu")))
            for family, folder in folders.items() for tp in (1, 2)}


def _measure_one(folder: str, model, context) -> dict:
    import megavg.rollout.answers as answers
    from megavg.rollout.native import NativeGenerator
    from tests.tiny_models import builder_of, encode_pictures, processor_of
    from tools.layout_memory import sizes_of
    from tools.plan_memory import stage_bytes

    processor = processor_of(Path(folder), model)
    prompts = encode_pictures(processor, [(84, 56, "the box")] * NUM_PROMPTS)
    generator = NativeGenerator(model, builder_of(model, processor, context), context, torch.float32, (),
                                processor.forbidden_token_ids, NUM_PROMPTS)
    generator.load_weights(model.hf_weights(generator.stage, context))
    caches, kind = [], answers.SharedPrefixCache

    class Recorded(kind):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    answers.SharedPrefixCache = Recorded
    generator.generate(prompts, NUM_ANSWERS, SamplingParams(max_new_tokens=NEW_TOKENS), list("abc"))
    answers.SharedPrefixCache = kind
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for cache in caches
                for held in (cache.prompt, cache.answer) for pair in held.values() for t in pair}
    patches, merge = prompts[0].pixel_values.shape[0], model.config.vision_config.spatial_merge_size**2
    work = Work(patches, len(prompts[0].input_ids) - patches // merge, NEW_TOKENS, 1, NUM_ANSWERS, NUM_PROMPTS)
    kinds = stage_bytes(sizes_of(model, context, torch.float32, 1), work, merge)
    weights = sum(p.numel() * p.element_size() for p in generator.stage.parameters())
    return {"measured": (weights, sum(storages.values())), "predicted": (kinds["rollout copy"], kinds["cache"])}


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8, 16])
def test_largest_micro_batch(group_size, micro_batch):
    work = Work(40, 7, 5, micro_batch, group_size)
    rows = [row // group_size for row in range(24 * group_size)]
    images = max(len(set(rows[i:i + micro_batch])) for i in range(0, len(rows), micro_batch))
    assert work.micro_batch_sizes(4) == (micro_batch * (10 + 7 + 5), images * 40, micro_batch * 5)
    assert work.num_micro_batches(2) == math.ceil(8 * group_size / micro_batch)


def test_order_is_least_communication_first():
    assert list(map(str, Machine(8, 8, 1).layouts()[:6])) == ["dp8", "tp2dp4", "pp2dp4", "tp4dp2", "tp2pp2dp2",
                                                              "pp4dp2"]
    layouts = Machine(16, 4, 1).layouts()
    assert {layout.tp for layout in layouts} == {1, 2, 4}  # never over nodes
    assert all(layout.num_processes == 16 for layout in layouts) and len(set(layouts)) == len(layouts)
    assert {layout.tp for layout in Machine(6, 8, 1).layouts()} == {1, 2, 3, 6}


def test_layouts_that_the_model_refuses_are_left_out_with_the_reason(small):
    refused = {}
    found = predictions(small, Machine(8, 8, 1e12), Work(prompts_per_step=4), False, refused)
    assert [str(each.layout) for each in found] == ["tp2dp4", "pp2dp4", "tp4dp2", "tp2pp2dp2", "pp4dp2", "tp4pp2",
                                                    "tp2pp4", "pp8"]
    assert "28 attention heads" in refused["tp8"] and "--prompts-per-step=4" in refused["dp8"]


def test_total_is_the_largest_moment_of_the_worst_stage(small):
    found = small.predict(Layout(2, 2, 2), Work(recompute=True, reference=True))
    assert sum(found.layers) == 28 and found.stage in (0, 1)
    standing = sum(found.kinds[kind] for kind in ("parameters", "gradients", "optimiser", "rollout copy", "reference"))
    added = {"update": found.kinds["activations"] + found.kinds["gathered"] + found.kinds["head tiles"],
             "optimiser's step": found.kinds["second gradients"], "start": found.kinds["whole weights"],
             "rollout": found.kinds["cache"] + max(found.kinds["prefill"], found.kinds["sampling"])}
    assert found.total == standing + max(added.values()) == standing + added[found.moment]
    assert found.kinds["reference"] == found.kinds["parameters"] > 0


def test_options_change_what_they_should(small):
    layout, work = Layout(1, 1, 8), Work(recompute=True)
    plain = small.predict(layout, work)
    changed = {name: small.predict(layout, dataclasses.replace(work, **{name: value})) for name, value in
               (("offload", True), ("freeze_vision_tower", True), ("recompute", False), ("prompts_per_pass", 1),
                ("dtype", "float32"))}
    assert changed["offload"].host == plain.kinds["gradients"] + plain.kinds["optimiser"] and not plain.host
    assert changed["offload"].total < plain.total > changed["freeze_vision_tower"].total
    assert changed["recompute"].total > plain.total
    assert changed["dtype"].kinds["parameters"] == 2 * plain.kinds["parameters"]
    assert changed["prompts_per_pass"].kinds["cache"] * 2 == plain.kinds["cache"]  # two prompts a rank


def test_choice_is_the_first_that_fits_and_recomputes_only_where_it_must(small):
    found = list(predictions(small, Machine(8, 8, 50e9), Work(), None))
    chosen = best(small, Machine(8, 8, 50e9), Work(), None)
    assert chosen == next(each for each in found if each.total <= 50e9)
    assert all(each.work.recompute == (small.predict(each.layout, Work()).total > 50e9) for each in found)
    assert {each.work.recompute for each in found} == {True, False}
    assert best(small, Machine(8, 8, 1e9), Work(), None) is None


def test_remedies_and_fewest_gpus(small):
    budget = 30e9
    fewest = fewest_gpus(small, Machine(32, 8, budget), Work(), None)
    gpus = fewest.layout.num_processes
    assert gpus > 1 and best(small, Machine(gpus // 2, 8, budget), Work(), None) is None
    found = dict(remedies(small, Machine(gpus // 2, 8, budget), Work(), None))
    assert found[f"--gpus {gpus}"] == fewest
    assert list(found)[:3] == ["--prompts-per-pass 1", "--freeze-vision-tower", "--offload"]
    assert all(plan is None or plan.total <= budget for plan in found.values())
    assert found["--offload"].work.offload


def test_options_are_those_of_a_training(capsys, tmp_path):
    report = tmp_path / "plan.json"
    argv = "--model Qwen3-VL-4B --gpus 2 --memory-gb 40 --freeze-vision-tower --offload --answer-tokens 64 --json"
    assert main([*argv.split(), str(report)]) == 0
    written, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert " ".join(written["options"]) in printed and "Host memory" in printed
    config = parse_command_line(["--config", str(ROOT / "examples/demo.yaml"), *shlex.split(printed.split("\n\n")[3])])
    layout = next(each for each in written["layouts"] if each["layout"] == written["chosen"])
    assert config.parallel.recompute == layout["work"]["recompute"] and config.parallel.zero.offload_optimizer
    assert config.model.freeze_vision_tower and config.rollout.max_new_tokens == 64
    assert layout["total"] <= written["machine"]["budget"] == 36e9


def test_a_folder_of_a_run_and_what_helps_where_nothing_fits(checkpoints, tmp_path, capsys):
    folder = checkpoints("qwen3_vl", **TINY["qwen3_vl"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((folder / "config.json").read_text())
    assert configuration(str(tmp_path)) == configuration(str(folder))
    assert main(["--model", str(tmp_path), "--gpus", "2", "--memory-gb", "0.001", "--no-recompute"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "--recompute: not enough" in printed and "--gpus 1024: not enough" in printed


@pytest.mark.parametrize("argv, message", [
    ([], "give either --model or --table"),
    (["--model", "Qwen2.5-VL-7b"], "did you mean"),
    (["--model", "tests"], "tests holds no config.json"),
    (["--model", "Qwen2.5-VL-7B", "--gpus", "12"], "--gpus=12 does not fill nodes of --gpus-per-node=8"),
    (["--model", "Qwen2.5-VL-7B", "--micro-batch", "0"], "--micro-batch must be at least 1"),
    (["--model", "Qwen2.5-VL-7B", "--reserve", "1"], "--reserve in [0, 1)"),
])
def test_bad_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        status = main(argv)
    except SystemExit as refused:
        status = refused.code
    assert status == 2 and message in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from tools.plan_layout import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--offload" in done.stdout, done.stderr
