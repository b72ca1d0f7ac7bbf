"""Conversions: there and back, from trained checkpoints of several layouts, with damages and mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavg.checkpoint.convert import Source
from megavg.checkpoint.hf import INDEX, SINGLE, HFCheckpoint
from megavg.checkpoint.manifest import read_manifest
from megavg.checkpoint.saved import SavedCheckpoint
from megavg.checkpoint.sharded import ShardedFolder
from tests.distributed import run_ranks
from tests.tiny_models import sharpened
from tests.tiny_runs import run_tree, train
from tools import convert_proof
from tools.convert_checkpoint import main

FAMILIES = {"qwen2_vl": {"tie_embeddings": True}, "qwen2_5_vl": {}, "qwen3_vl": {"tie_embeddings": True}}
"""With what each is made here."""


def call(*arguments) -> tuple[int, str, str]:
    """(exit status, output, errors) of the tool in this process, which has a world of its own."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), errors.getvalue()


def call_all(all_arguments: list) -> list[tuple[int, str, str]]:
    return [call(*arguments) for arguments in all_arguments]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a Hugging Face directory by the names in its files."""
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def difference(output: str) -> tuple[float, float]:
    """(largest difference of two logits, largest logit) that a conversion has printed."""
    found = re.search(r"^logits: .* differ by at most (\S+) where the largest is (\S+) ", output, re.MULTILINE)
    assert found, output
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def sources(checkpoints):
    """A checkpoint of each family whose weights are far from those it was drawn with."""
    return {family: sharpened(checkpoints(family, **fields)) for family, fields in FAMILIES.items()}


@pytest.fixture(scope="module")
def there_and_back(sources, tmp_path_factory):
    """(folder, what the tool said of each conversion): FAMILY/saved is the checkpoint, FAMILY/hf what it became."""
    folder, jobs = tmp_path_factory.mktemp("converted"), []
    for family, source in sources.items():
        (folder / family).mkdir()
        jobs += [(source, folder / family / "saved"),
                 (folder / family / "saved", folder / family / "hf", "--max-shard-size", "400KB")]
    return folder, run_ranks(1, call_all, jobs)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_same_bytes(sources, there_and_back, family):
    folder, source = there_and_back[0] / family, sources[family]
    saved = SavedCheckpoint(folder / "saved")
    assert saved.names == HFCheckpoint(source).names
    assert all(torch.equal(saved.read(name), HFCheckpoint(source).read(name)) for name in saved.names)
    about = read_manifest(folder / "saved")
    assert (about["family"], about["layout"], about["dtype"], about["step"]) == (family, "none", "float32", 0)
    assert all(name.startswith("weights/") for name in ShardedFolder(folder / "saved" / "state").tensors)
    assert_equal(weights_of(folder / "hf"), weights_of(source))
    assert len(list((folder / "hf").glob("*.safetensors"))) > 3
    for path in source.iterdir():
        if path.name != SINGLE:
            assert (folder / "hf" / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_is_called_like_a_scratch_folder_stays(sources, tmp_path):
    jobs = []
    for end in (".tmp", ".old", ".failed"):
        source = shutil.copytree(sources["qwen3_vl"], tmp_path / f"made{end}")
        jobs.append((source, tmp_path / "made", "--no-verify", "--overwrite"))
    ours, theirs, failed = run_ranks(1, call_all, jobs)[0]
    assert (ours[0], theirs[0]) == (0, 0), (ours, theirs)
    assert failed[0] == 2 and "OUT.failed" in failed[2] and "is or holds SOURCE" in failed[2]
    assert all((source / SINGLE).exists() for source, *_ in jobs)


def test_a_link_is_followed_and_stays(sources, there_and_back, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    saved = there_and_back[0] / "qwen3_vl" / "saved"
    jobs = [(saved, tmp_path / "out", "--no-verify"), (saved, tmp_path / "out", "--no-verify", "--overwrite")]
    assert [answer[0] for answer in run_ranks(1, call_all, jobs)[0]] == [0, 0]
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / SINGLE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_the_memory_of_every_control_group_counts(tmp_path):
    def group(path: str, **files: int) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (tmp_path / path / name.replace("_max", ".max").replace("_current", ".current").replace(
                "memory_limit", "memory.limit").replace("memory_usage", "memory.usage")).write_text(f"{value}\n")

    group("job/step", memory_max=900, memory_current=100)
    group("job", memory_max=500, memory_current=150)  # Slurm's limit of the job
    assert convert_proof._left_by_groups("0::/job/step\n", tmp_path) == [800, 350]
    group("memory/docker", memory_limit_in_bytes=300, memory_usage_in_bytes=40)
    told = "3:cpu,cpuacct:/docker\n2:memory:/docker\n0::/\n"
    assert convert_proof._left_by_groups(told, tmp_path) == [260]
    assert convert_proof._left_by_groups("0::/nowhere\n", tmp_path) == [] and convert_proof.available_bytes() > 0


def test_transformers_and_megavg_agree(there_and_back):
    folder, answers = there_and_back
    assert [(status, errors) for status, _, errors in answers] == [(0, "")] * 6
    for _, output, _ in answers:
        found, largest = difference(output)
        assert found <= 1e-4 and largest > 0.5
        assert "tensors are bit for bit those of SOURCE\n" in output
    assert sorted(path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".failed", ".old")) == []


def test_logits_are_left_out_for_a_reason(sources, there_and_back, monkeypatch):
    hf, saved = Source(sources["qwen3_vl"]), Source(there_and_back[0] / "qwen3_vl" / "saved")
    assert convert_proof.why_not(hf, saved) is None
    assert convert_proof.why_not(saved, saved) == "neither folder is one that transformers loads"
    monkeypatch.setattr(convert_proof, "available_bytes", lambda: 10**9)
    assert re.fullmatch(r"the model needs about 1\.1 GB of memory in fp32, 1\.0 GB are free",
                        convert_proof.why_not(hf, saved))


LAYERS = {"num_layers": 4, "vision_depth": 2}
"""Deepstack's additions fit on the first of two stages."""
TRAINED = {"from_hf": ("qwen2_5_vl", 2, 1, "bfloat16"), "tied_tp2": ("qwen2_vl", 2, 1, "float32"),
           "tied_pp2": ("qwen3_vl", 1, 2, "bfloat16", "model.freeze_vision_tower=true")}
"""Run -> family, tensor- and pipeline-parallel size, dtype, options; 515 tokens do not divide by 2."""


@pytest.fixture(scope="module")
def starts(checkpoints, there_and_back):
    """What the runs start from."""
    converted = there_and_back[0] / "qwen2_5_vl"
    return {"from_hf": converted / "hf", "from_saved": converted / "saved",
            "tied_tp2": checkpoints("qwen2_vl", tie_embeddings=True, **LAYERS),
            "tied_pp2": checkpoints("qwen3_vl", tie_embeddings=True, **LAYERS)}


@pytest.fixture(scope="module")
def trained(starts, scene_shards, tmp_path_factory):
    """Folder of runs of one step on 2 ranks, each with a checkpoint and an export of the trainer."""
    folder, trees = tmp_path_factory.mktemp("trained"), []
    for name, start in starts.items():
        _, tp, pp, dtype, *options = TRAINED.get(name, TRAINED["from_hf"])
        trees.append(run_tree(
            start, scene_shards(8), folder / name, "algorithm={name: sft}", "trainer.num_steps=1",
            "trainer.save_every=1", "trainer.export_hf=true", f"model.dtype={dtype}", "optimizer.lr=1e-2",
            f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}", *options))
    run_ranks(2, train_all, trees)
    return folder


def train_all(trees: list[dict]) -> None:
    for tree in trees:
        train(tree)


@pytest.fixture(scope="module")
def exported(trained):
    """What the tool said when it converted each of those runs to RUN/converted."""
    jobs = [(trained / name, trained / name / "converted", "--max-shard-size", "1MB") for name in TRAINED]
    jobs.append((trained / "from_hf", trained / "half", "--dtype", "float16"))
    jobs += [(trained / "from_hf", trained / "copy", "--to", "megavg"), (trained / "copy", trained / "copy-hf")]
    return dict(zip([*TRAINED, "half"], run_ranks(1, call_all, jobs)[0]))


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_checkpoint_becomes_what_the_trainer_exports(starts, trained, exported, name):
    """Padded vocabulary, tied and untied, trained and frozen, fp32 masters cast to what the run computed in."""
    dtype = TRAINED[name][3]
    status, output, errors = exported[name]
    assert status == 0, output + errors
    ours, theirs, start = (weights_of(path) for path in (trained / name / "converted", trained / name / "hf",
                                                        starts[name]))
    assert_equal(ours, theirs)
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, dtype)}
    assert ours.keys() == start.keys() and ("lm_head.weight" in ours) == (name == "from_hf")
    assert next(tensor.shape[0] for key, tensor in ours.items() if key.endswith("embed_tokens.weight")) == 515
    assert any(not torch.equal(ours[key], start[key].to(ours[key].dtype)) for key in ours), "it was trained"
    for path in (trained / name / "hf").iterdir():
        if path.suffix != ".safetensors":
            assert (trained / name / "converted" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((trained / name / "converted" / "config.json").read_text())["dtype"] == dtype
    found, largest = difference(output)
    assert found <= 1e-4 * max(1.0, largest)


def test_the_way_through_a_megavg_folder_gives_what_the_run_exports(trained, exported):
    """The folder holds fp32 master copies, and remembers that the run computed in bfloat16."""
    assert read_manifest(trained / "copy")["computed_in"] == "bfloat16"
    assert {dtype for _, dtype in ShardedFolder(trained / "copy" / "state").tensors.values()} == {torch.float32}
    assert_equal(weights_of(trained / "copy-hf"), weights_of(trained / "from_hf" / "hf"))
    assert json.loads((trained / "copy-hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_dtype_is_rounded_from_the_master_copies(trained, exported):
    assert exported["half"][0] == 0, exported["half"]
    saved = SavedCheckpoint(trained / "from_hf" / "checkpoints" / "step-000001")
    half, stored = HFCheckpoint(trained / "half"), saved.read("lm_head.weight")
    assert stored.dtype == torch.float32 and torch.equal(half.read("lm_head.weight"), stored.half())
    assert not torch.equal(stored.half(), stored.bfloat16().half()), "the one rounding is not the other"


def test_a_run_from_a_converted_checkpoint_is_the_run_from_its_source(trained):
    assert_equal(weights_of(trained / "from_saved" / "hf"), weights_of(trained / "from_hf" / "hf"))


def test_a_converted_checkpoint_is_nothing_to_resume(there_and_back):
    from megavg.checkpoint.train_state import read_trainer_state

    with pytest.raises(ValueError, match="model.path"):
        read_trainer_state(there_and_back[0] / "qwen3_vl" / "saved")


def flip(path: Path, place: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def swap(out: Path) -> None:
    """Two tensors of one shape in each other's place."""
    path = out / SINGLE
    tensors = load_file(path)
    pair = [f"model.language_model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def extra(out: Path) -> None:
    save_file({**load_file(out / SINGLE), "more": torch.zeros(3)}, out / SINGLE, metadata={"format": "pt"})


def first(out: Path) -> Path:
    return min(out.glob("*.safetensors"))


def stray(out: Path) -> None:
    save_file({"stray": torch.zeros(2)}, out / "model-00000.safetensors", metadata={"format": "pt"})


# option, damage, what is said of it
DAMAGES = {
    "a bit": ("5GB", lambda out: flip(out / SINGLE), "differs from that of .* in 1 of"),
    "swapped": ("5GB", swap, "layers.0.self_attn.q_proj.weight differs"),
    "one more": ("5GB", extra, "tensor more is in .*failed, but no part of the model"),
    "cut off": ("1MB", lambda out: first(out).write_bytes(first(out).read_bytes()[:-4]), "model-00001.*cannot be read"),
    "lost file": ("1MB", lambda out: first(out).unlink(), "model-00001.* is missing, but .*index.json lists it"),
    "total": ("1MB", lambda out: edit(out / INDEX, lambda c: c["metadata"].update(total_size=1)), "says 1 bytes, the"),
    "index": ("1MB", lambda out: edit(out / INDEX, lambda c: c["weight_map"].popitem()), "is missing in"),
    "stray file": ("1MB", stray, "index.json and the files disagree about stray, 1 entries"),
    "configuration": ("5GB", lambda out: edit(out / "config.json", lambda c: c["text_config"].update(rms_norm_eps=1.0)),
                      "config.json differs from that of the source in more than its dtype"),
    "said dtype": ("5GB", lambda out: edit(out / "config.json", lambda c: c.update(dtype="float16")),
                   r"config.json says dtype \{'dtype': 'float16'\}, the weights are in bfloat16"),
    "lost tokenizer": ("5GB", lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer": ("5GB", lambda out: flip(out / "tokenizer.json"), "tokenizer.json is not that of"),
}


def convert_with_damage(source: Path, saved: Path, folder: Path) -> dict:
    """Convert once for each damage, which comes between the writing and the verification."""
    from megavg.checkpoint import convert

    whole, answers = (convert.finish_hf, convert.write_saved), {}
    for name, (size, damage, _) in DAMAGES.items():
        convert.finish_hf = lambda out, *rest: (whole[0](out, *rest), damage(out))
        answers[name] = call(saved, folder / name, "--max-shard-size", size, "--dtype", "bfloat16")
    convert.write_saved = lambda out, *rest: (whole[1](out, *rest), flip(out / "state" / "__0_0.distcp", 5000))
    answers["state"] = call(source, folder / "state")
    convert.finish_hf, convert.write_saved = whole
    return answers


def logits_of_swapped(source: Path, out: Path) -> tuple[float, float]:
    swap(out)
    return convert_proof.logits_differ(Source(source), Source(out))


@pytest.fixture(scope="module")
def damaged(sources, there_and_back, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return folder, run_ranks(1, convert_with_damage, sources["qwen3_vl"], there_and_back[0] / "qwen3_vl" / "saved",
                             folder)[0]


@pytest.mark.parametrize("name", [*DAMAGES, "state"])
def test_a_planted_damage_is_found(damaged, name):
    folder, answers = damaged
    message = DAMAGES[name][2] if name in DAMAGES else "its checksum is not that of the manifest"
    status, output, errors = answers[name]
    assert status == 1 and re.search(f"WRONG: .*{message}", output), output + errors
    assert f"it is kept as {folder / name}.failed" in errors and "logits" not in output
    assert sorted(path.name for path in folder.glob(f"{name}*")) == [f"{name}.failed"]


def test_swapped_tensors_show_in_the_logits(sources, there_and_back, tmp_path):
    """The second proof does without the first: it would find what both folders' readers get wrong alike."""
    out = Path(shutil.copytree(sources["qwen3_vl"], tmp_path / "swapped"))
    found, largest = run_ranks(1, logits_of_swapped, there_and_back[0] / "qwen3_vl" / "saved", out)[0]
    assert found > 0.1 * largest


def mistakes(folder: Path, source: Path, saved: Path) -> dict[str, tuple[tuple, str]]:
    """Name -> (arguments, message) of what is refused with exit status 2."""
    def copied(name: str, change) -> Path:
        copy = Path(shutil.copytree(source, folder / f"source {name}"))
        change(copy)
        return copy

    def with_weights(change):
        def rewrite(copy: Path) -> None:
            tensors = load_file(copy / SINGLE)
            change(tensors)
            save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
        return rewrite

    torn = Path(shutil.copytree(saved, folder / "torn"))
    flip(torn / "state" / "__0_0.distcp", 5000)
    (folder / "notes").mkdir()
    (folder / "notes" / "text").write_text("kept")
    (folder / "there").mkdir()
    (folder / "there" / "config.json").write_text("{}")
    norm = "model.language_model.norm.weight"
    other = copied("family", lambda copy: edit(copy / "config.json", lambda c: c.update(model_type="qwen2")))
    cut = copied("cut", lambda copy: (copy / SINGLE).write_bytes((copy / SINGLE).read_bytes()[:-8]))
    return {
        "nowhere": ((folder / "nowhere",), "SOURCE .*nowhere is no folder; name a Hugging Face"),
        "no checkpoint": ((folder / "notes",), "holds no config.json, no manifest.json, and no checkpoints/step-"),
        "family": ((other,), "model_type='qwen2' in .*config.json is no family of megavg; it has qwen2_vl, "),
        "cut": ((cut,), f"source cut/{SINGLE} cannot be read .*truncated .*copy it again"),
        "lost": ((copied("lost", with_weights(lambda t: t.pop(norm))),), f"tensor {norm} is missing in .*source lost"),
        "more": ((copied("more", with_weights(lambda t: t.update(more=torch.zeros(1)))),),
                 "holds tensor more, which a qwen3_vl model with its config.json has no place for"),
        "quantised": ((copied("int8", with_weights(lambda t: t.update({norm: t[norm].to(torch.int8)}))),),
                      f"tensor {norm} in .* is stored in I8; only fp64"),
        "head": ((copied("head", with_weights(lambda t: t.update({"lm_head.weight": torch.zeros(515, 64)}))),),
                 "holds tensor lm_head.weight, which a qwen3_vl model"),
        "large": ((copied("large", with_weights(lambda t: t[norm].fill_(1e5))), "--dtype", "float16"),
                  f"{norm} holds numbers up to 1e.05, which do not fit into float16"),
        "torn": ((torn,), "__0_0.distcp is damaged: its checksum is not that of the manifest.json .1 files in all"),
        "there": ((source, folder / "there"), "OUT .*there exists; name another folder as OUT, or give --overwrite"),
        "not ours": ((source, folder / "notes", "--overwrite"), "notes is no checkpoint, so --overwrite does not"),
        "itself": ((source, source, "--overwrite"), "is or holds SOURCE"),
        "around": ((source, source.parent, "--overwrite"), "is or holds SOURCE"),
    }


def refuse_all(jobs: dict, source: Path, out: Path) -> dict:
    answers = {name: call(*arguments, *([out] if len(arguments) == 1 or arguments[1] == "--dtype" else []))
               for name, (arguments, _) in jobs.items()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a write fails in the middle of a file, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        answers["hf stopped"], answers["saved stopped"] = call(source, out, "--to", "hf"), call(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return answers


def test_mistakes_are_told_in_one_line_and_leave_nothing(sources, there_and_back, tmp_path):
    folder, out = tmp_path / "given", tmp_path / "made" / "out"
    folder.mkdir()
    jobs = mistakes(folder, sources["qwen3_vl"], there_and_back[0] / "qwen3_vl" / "saved")
    (answers,) = run_ranks(1, refuse_all, jobs, sources["qwen3_vl"], out)
    expected = {name: message for name, (_, message) in jobs.items()}
    expected |= dict.fromkeys(("hf stopped", "saved stopped"), "OUT .* cannot be written .*File too large.; make room")
    for name, message in expected.items():
        status, output, errors = answers[name]
        assert status == 2 and output == "", (name, output, errors)
        assert re.search(f"^convert_checkpoint: error: .*{message}", errors), (name, errors)
        assert errors.count("\n") == 1, (name, errors)
    assert (folder / "notes" / "text").read_text() == "kept"
    assert not out.parent.exists() or not any(out.parent.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_with_too_little_room_is_told_before_anything_is_written(sources, small_disk):
    ((status, output, errors),), = run_ranks(1, call_all, [(sources["qwen3_vl"], small_disk / "out")])
    assert status == 2 and re.search(r"OUT needs 0.0\d GB, and 0.04 GB are free in .*disk; make room", errors), errors
    assert not any(small_disk.iterdir())


def test_processes_write_the_same_files(there_and_back, tmp_path):
    """With an old result in the way, a half-made one, and folders of others that are called alike."""
    saved, one = there_and_back[0] / "qwen3_vl" / "saved", there_and_back[0] / "qwen3_vl" / "hf"
    out = tmp_path / "out"
    shutil.copytree(saved, out)
    others = [f"out{end}" for end in (".tmp", ".old", ".new")]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.megavg-new" / "state").mkdir(parents=True)
    status, output, errors = call(saved, out, "--workers", "2", "--max-shard-size", "400KB", "--no-verify",
                                  "--overwrite")
    assert status == 0, errors
    assert output.startswith(f"{out}: Hugging Face directory, ") and output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *others])
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in one.iterdir())
    for path in one.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
