"""Hugging Face directories: streamed shards that transformers loads, exports from engines, and damaged checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavg.checkpoint.hf import INDEX, SINGLE, HFCheckpoint, write_checkpoint
from tests.distributed import run_ranks
from tests.tiny_models import hf_model, sharpened

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SHARD_BYTES = 400_000  # the largest tensor, the embedding of patches, has 393,216
EXPORTS = [("qwen2_5_vl", {"tie_embeddings": True}, 2), ("qwen2_5_vl", {}, 1), ("qwen3_vl", {}, 2),
           ("qwen3_vl", {"tie_embeddings": True}, 1)]


@pytest.fixture
def copied(checkpoints, tmp_path) -> Path:
    """A Qwen3-VL checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoints("qwen3_vl"), tmp_path / "copied"))


def rewrite(source: Path, out: Path, **options) -> HFCheckpoint:
    """Read every tensor of ``source`` and write it to ``out``."""
    checkpoint = HFCheckpoint(source)
    write_checkpoint(out, ((name, checkpoint.read(name)) for name in checkpoint.names), checkpoint, **options)
    return checkpoint


def assert_transformers_loads_equal(ours: Path, theirs: Path) -> None:
    written, source = (hf_model(folder).state_dict() for folder in (ours, theirs))
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], source[name]) for name in source)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_load_in_transformers(checkpoints, tmp_path, family, tied):
    source, out = sharpened(checkpoints(family, tie_embeddings=tied)), tmp_path / "out"
    rewrite(source, out, max_shard_bytes=SHARD_BYTES)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / INDEX).read_text())
    held = {file.name: load_file(file) for file in files}
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in held.items()}
    assert len(files) > 3 and max(sizes.values()) <= SHARD_BYTES
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                                             for i in range(len(files))]
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert_transformers_loads_equal(out, source)
    again = HFCheckpoint(out)
    assert again.names == HFCheckpoint(source).names
    assert all(torch.equal(again.read(name), HFCheckpoint(source).read(name)) for name in again.names)


def test_a_tensor_larger_than_a_shard_gets_its_own(copied, tmp_path):
    rewrite(copied, tmp_path / "out", max_shard_bytes=1)
    names = HFCheckpoint(copied).names
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(names)
    assert HFCheckpoint(tmp_path / "out").names == names


def test_written_like_the_source(copied, tmp_path):
    """All other files come along byte by byte, an index of the source does not, and all may be read by the same."""
    rewrite(copied, tmp_path / "sharded", max_shard_bytes=SHARD_BYTES)
    rewrite(tmp_path / "sharded", tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in copied.iterdir())
    for path in out.iterdir():
        if path.name != SINGLE:
            assert path.read_bytes() == (copied / path.name).read_bytes()
    for folder in (out, tmp_path / "sharded"):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copied", "out", "sharded"]


def test_an_existing_directory_is_replaced_whole(copied, tmp_path):
    out = tmp_path / "out"
    rewrite(copied, out, max_shard_bytes=SHARD_BYTES)
    rewrite(copied, out)
    assert [p.name for p in out.glob("*.safetensors")] == [SINGLE] and not (out / INDEX).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copied", "out"]


def test_an_interrupted_write_leaves_the_old_directory(copied, tmp_path):
    out = tmp_path / "out"
    checkpoint = rewrite(copied, out)
    before = (out / SINGLE).read_bytes()

    def interrupted():
        yield checkpoint.names[0], torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(out, interrupted(), checkpoint)
    assert (out / SINGLE).read_bytes() == before
    rewrite(copied, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copied", "out"]


def test_tensors_may_be_reused_by_who_gives_them(copied, tmp_path):
    """Gathered weights are valid only until the next is asked for."""
    checkpoint = HFCheckpoint(copied)

    def fleeting():
        for name in checkpoint.names:
            tensor = checkpoint.read(name).clone()
            yield name, tensor
            tensor.fill_(-1)

    write_checkpoint(tmp_path / "out", fleeting(), checkpoint)
    written = HFCheckpoint(tmp_path / "out")
    assert all(torch.equal(written.read(name), checkpoint.read(name)) for name in checkpoint.names)


def legacy_copy(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """``source`` with the names that Qwen2.5-VL has on the hub; returns its tensors by those names."""
    shutil.copytree(source, out)
    tensors = {}
    for name, tensor in load_file(source / SINGLE).items():
        for modern, legacy in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(modern):
                name = legacy + name.removeprefix(modern)
                break
        tensors[name] = tensor
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    return tensors


def test_older_names_are_read_as_new_ones_and_kept_on_writing(checkpoints, tmp_path):
    modern, legacy, out = sharpened(checkpoints("qwen2_5_vl")), tmp_path / "legacy", tmp_path / "out"
    tensors = legacy_copy(modern, legacy)
    assert {name.split(".")[0] for name in tensors} == {"visual", "model", "lm_head"}
    checkpoint = rewrite(legacy, out)
    assert checkpoint.names == HFCheckpoint(modern).names
    assert all(torch.equal(checkpoint.read(name), HFCheckpoint(modern).read(name)) for name in checkpoint.names)
    written = load_file(out / SINGLE)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert_transformers_loads_equal(out, modern)


def test_missing_directory_and_files(copied):
    with pytest.raises(FileNotFoundError, match="checkpoint directory .*nowhere does not exist"):
        HFCheckpoint(copied.parent / "nowhere")
    (copied / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=f"copied holds neither {SINGLE} nor {INDEX}"):
        HFCheckpoint(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing; expected a Hugging Face checkpoint"):
        HFCheckpoint(copied)


def test_missing_shard(copied, tmp_path):
    rewrite(copied, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone.name} is missing, but .*{INDEX} lists it; copy"):
        HFCheckpoint(tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 1000, 100_000])
def test_truncated_file(copied, keep):
    path = copied / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"copied/{SINGLE} cannot be read .* truncated or no safetensors file: copy"):
        HFCheckpoint(copied)


def test_truncated_shard_is_named_when_read(copied, tmp_path):
    rewrite(copied, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    checkpoint = HFCheckpoint(tmp_path / "out")
    torn = tmp_path / "out" / json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"][checkpoint.names[0]]
    torn.write_bytes(torn.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{torn.name} cannot be read"):
        checkpoint.read(checkpoint.names[0])


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"weight_map": 3}', '{"weight_map": {"a": '])
def test_damaged_index(copied, text):
    (copied / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is damaged: expected a JSON object with a weight_map"):
        HFCheckpoint(copied)


def test_index_that_names_the_wrong_file(copied, tmp_path):
    rewrite(copied, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    name, last = min(index["weight_map"]), max(index["weight_map"].values())
    assert index["weight_map"][name] != last
    index["weight_map"][name] = last
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    for ask in (HFCheckpoint.read, HFCheckpoint.facts):
        with pytest.raises(ValueError, match=f"{last} does not hold tensor {name}"):
            ask(HFCheckpoint(tmp_path / "out"), name)


def test_missing_tensor(copied):
    from megavg.models.base import load_model

    tensors = load_file(copied / SINGLE)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, copied / SINGLE)
    with pytest.raises(ValueError, match="tensor model.language_model.norm.weight is missing in .*copied; the"):
        load_model(copied).checkpoint.read("model.language_model.norm.weight")


def test_export_of_an_untrained_engine_is_bit_equal(checkpoints, tmp_path):
    """Checkpoint -> ZeRO-3 engine at TP2 and at DP2 -> checkpoint: padded vocabulary, tied and untied."""
    jobs = [(str(sharpened(checkpoints(family, **fields))), tp_size, str(tmp_path / f"export-{i}"))
            for i, (family, fields, tp_size) in enumerate(EXPORTS)]
    run_ranks(2, _export, jobs)
    for source, _, out in jobs:
        assert sorted(p.name for p in Path(out).iterdir()) == sorted(p.name for p in Path(source).iterdir())
        ours, theirs = load_file(Path(out) / SINGLE), load_file(Path(source) / SINGLE)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert (Path(out) / "config.json").read_bytes() == (Path(source) / "config.json").read_bytes()
        assert_transformers_loads_equal(Path(out), Path(source))


def _export(jobs: list[tuple[str, int, str]]) -> None:
    from megavg.parallel.mcore import make_context
    from megavg.protocols.options import OptimizerConfig, ZeroConfig
    from megavg.trainer.config import ModelConfig
    from megavg.trainer.policy import Policy

    for source, tp_size, out in jobs:
        policy = Policy(ModelConfig(source, dtype="float32"), OptimizerConfig(), ZeroConfig(),
                        make_context(tp_size, 1, torch.device("cpu")), with_reference=False, prompts_per_pass=4)
        policy.export_hf(Path(out))
