"""tools/inspect_checkpoint.py tells what a folder holds, finds what is wrong with it, and compares two of any kind."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavg.checkpoint import difference, survey
from megavg.checkpoint.manifest import MANIFEST, facts_of, read_manifest, write_manifest
from megavg.checkpoint.parts import parts_of_run
from megavg.checkpoint.sharded import write_parts
from megavg.checkpoint.weight_map import WeightEntry
from tools import inspect_checkpoint

ROOT = Path(__file__).parents[2]
TEXT = "model.language_model."
SHAPES = {"model.visual.patch_embed.proj.weight": (4, 3, 2), "model.visual.blocks.0.norm1.weight": (5,),
          "model.visual.blocks.10.norm1.weight": (5,), "model.visual.merger.mlp.0.weight": (3, 7),
          f"{TEXT}embed_tokens.weight": (11, 6), f"{TEXT}layers.0.mlp.down_proj.weight": (6, 9),
          f"{TEXT}layers.1.mlp.down_proj.weight": (6, 9), f"{TEXT}layers.1.input_layernorm.weight": (6,),
          f"{TEXT}norm.weight": (6,), "lm_head.weight": (11, 6)}
GROUPS = {"layer": ["vision embedding", "vision block 0", "vision block 10", "merger", "embedding", "decoder layer 0",
                    "decoder layer 1", "final norm", "head", "all"],
          "tensor": [*(name for name in SHAPES if ".layers." not in name and name not in (
              f"{TEXT}norm.weight", "lm_head.weight")), f"{TEXT}layers.0.mlp.down_proj.weight",
              f"{TEXT}layers.1.input_layernorm.weight", f"{TEXT}layers.1.mlp.down_proj.weight", f"{TEXT}norm.weight",
              "lm_head.weight", "all"],
          "kind": ["model.visual.patch_embed.proj.weight", "model.visual.blocks.*.norm1.weight",
                   "model.visual.merger.mlp.*.weight", f"{TEXT}embed_tokens.weight",
                   f"{TEXT}layers.*.mlp.down_proj.weight", f"{TEXT}layers.*.input_layernorm.weight",
                   f"{TEXT}norm.weight", "lm_head.weight", "all"]}


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{kind}/{name}": torch.randn(shape, generator=generator)
            for kind in ("weights", "exp_avg", "exp_avg_sq") for name, shape in SHAPES.items()}


def write_step(folder: Path, state: dict[str, torch.Tensor], num_shards: int = 1, step: int = 7) -> Path:
    """A checkpoint of a run whose tensors lie in ``num_shards`` runs each, with all of its files."""
    parts = []
    for full_name, tensor in state.items():
        kind, name = full_name.split("/", 1)
        flat, size = tensor.reshape(-1), -(-tensor.numel() // num_shards)
        for start in range(0, tensor.numel(), size):
            parts += parts_of_run(WeightEntry(name, (name,)), tensor.shape, start, {kind: flat[start:start + size]},
                                  1, 0, True)
    write_parts(folder / "state", parts)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (folder / "trainer.json").write_text(json.dumps({
        "step": step, "data": {"epoch": 2, "consumed": 40, "fingerprint": {}}, "optimizer_steps": step,
        "algorithm": {"name": "ecvgpo"}}))
    files = facts_of(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    write_manifest(folder, files, {"step": step, "layout": "TP1 x PP1 x DP3", "world_size": 3, "family": "qwen3_vl",
                                   "dtype": "bfloat16", "legacy_names": False})
    return folder


def write_hf(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def weights_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights/"): tensor for name, tensor in state.items() if name.startswith("weights/")}


def inspect(capsys, *arguments) -> tuple[int, dict, str]:
    """Exit status, JSON report and printed text."""
    words = [str(word) for word in arguments]
    capsys.readouterr()
    status = inspect_checkpoint.main([*words, "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert inspect_checkpoint.main(words) == status
    return status, report, capsys.readouterr().out


def pieces(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The tiny tensors are looked at in several pieces."""
    monkeypatch.setattr(survey, "PIECE", 7)
    monkeypatch.setattr(difference, "PIECE", 7)


@pytest.fixture
def run(tmp_path):
    """Output folder of a run with two checkpoints, and the state of the newer one."""
    for step in (7, 12):
        write_step(tmp_path / "run" / "checkpoints" / f"step-{step:06d}", random_state(step), 3, step)
    return tmp_path / "run"


@pytest.mark.parametrize("by", GROUPS)
def test_tables_of_all_kinds(run, capsys, by):
    status, report, text = inspect(capsys, run, "--by", by)
    assert status == 0 and report["ok"] and "every number is finite" in text
    state, all_figures = random_state(12), {}
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        rows = report["tables"][kind]
        assert [row["group"] for row in rows] == GROUPS[by]
        values = pieces(state[f"{kind}/{name}"] for name in SHAPES)
        assert rows[-1]["tensors"] == len(SHAPES) == sum(row["tensors"] for row in rows[:-1])
        assert rows[-1]["parameters"] == values.numel() and rows[-1]["bytes"] == 4 * values.numel()
        assert math.isclose(rows[-1]["norm"], float(values.norm()), rel_tol=1e-12)
        assert rows[-1]["largest"] == float(values.abs().max()) and rows[-1]["nan"] == rows[-1]["inf"] == 0
        all_figures[kind] = {row["group"]: row for row in rows}
    if by == "layer":
        found = all_figures["exp_avg"]["decoder layer 1"]
        values = pieces(state[f"exp_avg/{TEXT}layers.1.{n}.weight"] for n in ("mlp.down_proj", "input_layernorm"))
        assert found["tensors"] == 2 and math.isclose(found["norm"], float(values.norm()), rel_tol=1e-12)
        assert found["largest"] == float(values.abs().max())


def test_what_a_checkpoint_is(run, capsys):
    status, report, text = inspect(capsys, run, "--check")
    about = report["about"][0]
    assert status == 0 and about["path"] == str(run / "checkpoints" / "step-000012"), "the newest"
    assert about["data"] == {"epoch": 2, "consumed": 40} and about["versions"]["torch"] == torch.__version__
    assert about["state"]["weights"]["dtypes"] == {"float32": len(SHAPES)}
    for words in ("checkpoint of a run, qwen3_vl", "step 12, layout TP1 x PP1 x DP3, 3 ranks, model.dtype bfloat16",
                  "algorithm ecvgpo, 12 updates; data: epoch 2, consumed 40", "is as it was written"):
        assert words in text
    older = run / "checkpoints" / "step-000007"
    assert inspect(capsys, older)[1]["about"][0]["step"] == 7
    assert inspect(capsys, older.parent)[1]["about"][0]["step"] == 12


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_tensor_of_a_family_is_in_a_layer(checkpoints, capsys, monkeypatch, family):
    monkeypatch.setattr(survey, "PIECE", 1 << 12)
    folder = checkpoints(family)
    stored = load_file(folder / "model.safetensors")
    status, report, text = inspect(capsys, folder, "--check")
    rows = report["tables"]["weights"]
    assert status == 0 and f"Hugging Face directory, {family}" in text and "no checksums" in text
    assert not [row["group"] for row in rows if "." in row["group"]]
    assert rows[-1]["tensors"] == len(stored)
    assert math.isclose(rows[-1]["norm"], float(pieces(stored.values()).norm()), rel_tol=1e-12)
    assert {"vision embedding", "vision block 2", "merger", "decoder layer 2", "head"} <= {row["group"] for row in rows}


def test_numbers_that_are_not_finite(tmp_path, capsys):
    state = random_state()
    broken, emptied = f"weights/{TEXT}layers.1.mlp.down_proj.weight", f"exp_avg/{TEXT}norm.weight"
    state[broken][2, 3], state[broken][5, 8], state[broken][0, 0] = math.nan, -math.inf, math.inf
    state[emptied][:] = math.nan
    status, report, text = inspect(capsys, write_step(tmp_path / "step", state))
    assert status == 1 and not report["ok"]
    assert report["not_finite"] == [{"name": emptied, "nan": 6, "inf": 0}, {"name": broken, "nan": 1, "inf": 2}] or \
        report["not_finite"] == [{"name": broken, "nan": 1, "inf": 2}, {"name": emptied, "nan": 6, "inf": 0}]
    assert f"WRONG: not finite: {broken}: 1 NaN, 2 Inf" in text and "every number" not in text
    row = next(row for row in report["tables"]["weights"] if row["group"] == "decoder layer 1")
    kept = pieces([state[broken], state[f"weights/{TEXT}layers.1.input_layernorm.weight"]])
    kept = kept[kept.isfinite()]
    assert math.isclose(row["norm"], float(kept.norm()), rel_tol=1e-12) and row["largest"] == float(kept.abs().max())
    assert (row["nan"], row["inf"]) == (1, 2)


def test_one_tensor_is_in_memory_at_a_time(run):
    holding = survey.open_holding(survey.find_checkpoint(run))
    given: list[weakref.ref] = []

    def read(name: str) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in given))
        tensor = holding.read(name)
        given.append(weakref.ref(tensor))
        return tensor

    watched, alive = dataclasses.replace(holding, read=read), list[int]()
    survey.survey(watched, "layer", lambda num_bytes: None)
    assert len(alive) == 3 * len(SHAPES) and max(alive) == 0
    given.clear()
    alive.clear()
    assert difference.compare(watched, watched, "layer", None, lambda num_bytes: None)["equal"]
    assert len(alive) == 6 * len(SHAPES) and max(alive) == 1


def test_damaged_files(run, capsys):
    folder = run / "checkpoints" / "step-000012"
    (folder / "left.txt").write_text("by somebody")
    status, report, text = inspect(capsys, run, "--check")
    assert status == 0 and "note: left.txt" in text
    file = next((folder / "state").glob("__*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    status, report, text = inspect(capsys, run, "--check")
    assert status == 1 and "tables" not in report and f"WRONG: {file} is damaged" in text
    file.write_bytes(data[:-5])
    assert inspect(capsys, run, "--check")[0] == 1
    assert inspect_checkpoint.main([str(run)]) == 2 and f"{file} is missing or truncated" in capsys.readouterr().err


def test_the_same_state_in_two_layouts_is_equal(tmp_path, capsys):
    one, three = write_step(tmp_path / "a", random_state(), 1), write_step(tmp_path / "b", random_state(), 3)
    status, report, text = inspect(capsys, one, three, "--check")
    assert status == 0 and report["equal"] and report["equal_tensors"] == report["tensors"] == 3 * len(SHAPES)
    assert all(row["norm"] == row["relative"] == row["largest"] == 0 for rows in report["tables"].values()
               for row in rows)
    assert f"{3 * len(SHAPES)} of {3 * len(SHAPES)} tensors are equal bit for bit: equal" in text


def test_one_changed_number(tmp_path, capsys):
    changed = random_state()
    name = f"exp_avg_sq/{TEXT}layers.0.mlp.down_proj.weight"
    first = pieces([changed[name]])
    changed[name][5, 8] += 0.25
    gap = float((pieces([changed[name]]) - first).abs().max())
    a, b = write_step(tmp_path / "a", random_state(), 2), write_step(tmp_path / "b", changed, 2)
    status, report, text = inspect(capsys, a, b)
    assert status == 1 and not report["equal"] and report["equal_tensors"] == report["tensors"] - 1
    row = next(row for row in report["tables"]["exp_avg_sq"] if row["group"] == "decoder layer 0")
    assert (row["equal"], row["norm"], row["largest"], row["not_finite"]) == (0, gap, gap, 0)
    assert math.isclose(row["relative"], gap / float(first.norm()), rel_tol=1e-12)
    assert report["tables"]["weights"][-1]["equal"] == len(SHAPES) and text.rstrip().endswith("different")


def test_signs_of_zero_and_nans_count_by_their_bits(tmp_path, capsys):
    a, b = random_state(), random_state()
    name, other = f"weights/{TEXT}norm.weight", "weights/lm_head.weight"
    for state in (a, b):
        state[name][1], state[other][0, 0] = math.nan, math.inf
    b[other][3, 3] = math.nan
    a["weights/model.visual.blocks.0.norm1.weight"][0], b["weights/model.visual.blocks.0.norm1.weight"][0] = 0.0, -0.0
    _, report, _ = inspect(capsys, write_step(tmp_path / "a", a), write_step(tmp_path / "b", b))
    rows = {row["group"]: row for row in report["tables"]["weights"]}
    assert rows["final norm"]["equal"] == 1 and rows["final norm"]["norm"] == 0, "the same NaN"
    assert rows["vision block 0"]["equal"] == 0 and rows["vision block 0"]["norm"] == 0
    assert rows["head"]["not_finite"] == 1 and rows["head"]["norm"] == 0
    assert report["equal_tensors"] == report["tensors"] - 2


def test_names_and_shapes_that_differ(tmp_path, capsys):
    a, b = random_state(), random_state()
    gone, reshaped = f"weights/{TEXT}norm.weight", "exp_avg/lm_head.weight"
    del a[gone]
    b["weights/extra.weight"] = torch.ones(2)
    a[reshaped] = a[reshaped].t()
    first, second = write_step(tmp_path / "a", a), write_step(tmp_path / "b", b)
    status, report, text = inspect(capsys, first, second)
    assert status == 1 and report["only_in_first"] == [] and report["only_in_second"] == ["weights/extra.weight", gone]
    assert report["shapes"] == [{"name": reshaped, "first": [6, 11], "second": [11, 6]}]
    assert f"only in {second}: {gone}" in text and f"other shapes: {reshaped}: [6, 11] and [11, 6]" in text
    assert report["equal_tensors"] == report["tensors"] == 3 * len(SHAPES) - 2, "what can be compared is equal"
    a = random_state()
    del a[gone]
    assert inspect(capsys, write_step(tmp_path / "c", a), write_step(tmp_path / "d", random_state()))[0] == 1


def test_a_hugging_face_directory_beside_a_checkpoint(tmp_path, capsys):
    state = random_state()
    step, hf = write_step(tmp_path / "step", state, 2), write_hf(tmp_path / "hf", weights_of(state))
    status, report, text = inspect(capsys, hf, step)
    assert status == 0 and report["not_compared"] == ["exp_avg", "exp_avg_sq"] and "not compared" in text
    narrow = write_hf(tmp_path / "narrow", {name: tensor.bfloat16() for name, tensor in weights_of(state).items()})
    status, report, text = inspect(capsys, step, narrow)
    assert status == 1 and len(report["dtypes"]) == len(SHAPES) and report["equal_tensors"] < len(SHAPES)
    rounding = pieces(weights_of(state).values()) - pieces(t.bfloat16() for t in weights_of(state).values())
    assert math.isclose(report["tables"]["weights"][-1]["norm"], float(rounding.norm()), rel_tol=1e-12)
    status, report, text = inspect(capsys, step, narrow, "--cast", "bfloat16")
    assert status == 0 and report["equal_tensors"] == len(SHAPES) and "bit for bit in bfloat16: equal" in text


def test_a_tied_head_that_is_stored_is_left_out(tmp_path, capsys):
    weights = weights_of(random_state())
    with_head = {**weights, "lm_head.weight": weights[f"{TEXT}embed_tokens.weight"].clone()}
    without = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    tied, alone = (write_hf(tmp_path / name, tensors, tie_word_embeddings=True)
                   for name, tensors in (("tied", with_head), ("alone", without)))
    status, report, text = inspect(capsys, tied, alone)
    assert status == 0 and report["about"][0]["tied_head_left_out"] and "tied to the embedding" in text
    untied = write_hf(tmp_path / "untied", with_head)
    assert inspect(capsys, untied, alone)[1]["only_in_first"] == ["weights/lm_head.weight"]


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: shutil.rmtree(folder / "checkpoints"), "holds no checkpoint; expected"),
    (lambda folder: (folder / "checkpoints" / "step-000012" / MANIFEST).write_text("{"), "manifest.json is damaged"),
    (lambda folder: (folder / "checkpoints" / "step-000012" / "state" / ".metadata").unlink(), "missing or truncated"),
])
def test_folders_that_cannot_be_read(run, capsys, spoil, words):
    spoil(run)
    assert inspect_checkpoint.main([str(run)]) == 2
    assert words in capsys.readouterr().err


def test_an_unfinished_checkpoint(run, capsys):
    folder = run / "checkpoints" / "step-000012"
    assert read_manifest(folder)["step"] == 12
    (folder / MANIFEST).unlink()
    assert inspect(capsys, run)[1]["about"][0]["step"] == 7, "it is passed over"
    assert inspect_checkpoint.main([str(folder)]) == 2
    assert "is no whole checkpoint: it has no manifest.json" in capsys.readouterr().err


def test_the_report_is_written(run, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert inspect_checkpoint.main([str(run), "--json", str(out)]) == 0 and json.loads(out.read_text())["ok"]
    with pytest.raises(SystemExit) as stopped:
        inspect_checkpoint.main([str(run), "--cast", "float16"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("tool", ["inspect_checkpoint", "bench_checkpoint"])
def test_help_needs_no_library(tool):
    code = ("import sys, runpy\nsys.modules.update(torch=None, transformers=None, deepspeed=None)\n"
            f"sys.argv = ['x', '--help']\nrunpy.run_path('tools/{tool}.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--json" in done.stdout, done.stderr
