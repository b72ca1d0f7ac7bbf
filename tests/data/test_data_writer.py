"""Shards hold what was put in, bit for bit, their bytes repeat, and a failure leaves the folder as it was."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from megavg.data.sample import SampleError
from megavg.data.shards import iterate_all
from megavg.data.writer import OWNER, file_sha256, write_shards, write_tar


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_round_trip_is_bit_equal(tmp_path, make_sample, image_format):
    samples = [make_sample(i, 20 + i, 18 + i % 3) for i in range(11)]
    write_shards(samples, str(tmp_path), "train", 4, image_format)
    back = list(iterate_all(str(tmp_path)))
    assert len(back) == len(samples)
    for old, new in zip(samples, back):
        assert (new.key, new.width, new.height, new.expression) == (old.key, old.width, old.height, old.expression)
        assert new.boxes_xyxy_px == old.boxes_xyxy_px and new.meta == old.meta
        assert new.image.mode == "RGB" and new.image.tobytes() == old.image.tobytes()
    assert [os.path.basename(s.shard) for s in back[::4]] == [f"train-{i:06d}.tar" for i in range(3)]


def test_jpg_keeps_boxes_and_size(tmp_path, make_sample):
    write_shards([make_sample(1)], str(tmp_path), "train", 4, "jpg")
    (back,) = iterate_all(str(tmp_path))
    assert back.boxes_xyxy_px == make_sample(1).boxes_xyxy_px and back.image.size == (24, 18)


def test_bytes_depend_on_the_samples_alone(tmp_path, make_sample):
    for name in ("a", "b"):
        write_shards((make_sample(i) for i in range(9)), str(tmp_path / name), "train", 4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_leftover_image_info_is_not_stored(tmp_path, make_sample):
    sample = make_sample(1)
    write_shards([sample], str(tmp_path / "a"), "t", 1)
    sample.image.info["icc_profile"] = b"profile" * 9
    write_shards([sample], str(tmp_path / "b"), "t", 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and "icc_profile" in sample.image.info


def test_index_tells_counts_sizes_and_checksums(tmp_path, make_sample):
    index = write_shards((make_sample(i) for i in range(9)), str(tmp_path), "train", 4)
    assert json.loads((tmp_path / "index.json").read_text()) == index
    assert [shard["num_samples"] for shard in index["shards"]] == [4, 4, 1] and index["num_samples"] == 9
    for shard in index["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data) and shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert index["bytes"] == sum(shard["bytes"] for shard in index["shards"])


def test_failure_leaves_the_folder_as_it_was(tmp_path, make_sample):
    write_shards((make_sample(i) for i in range(5)), str(tmp_path), "train", 2)
    before = contents(tmp_path)
    bad = make_sample(7, boxes_xyxy_px=((0.0, 0.0, 25.0, 18.0),))
    with pytest.raises(SampleError, match="box outside image"):
        write_shards([make_sample(5), make_sample(6), bad], str(tmp_path), "train", 2)
    assert contents(tmp_path) == before


def test_fewer_shards_replace_the_whole_set_and_nothing_else(tmp_path, make_sample):
    write_shards((make_sample(i) for i in range(5)), str(tmp_path), "train", 1)
    (tmp_path / "train-notes.txt").write_text("keep")
    write_shards((make_sample(i) for i in range(2)), str(tmp_path), "train", 1)
    assert sorted(contents(tmp_path)) == ["index.json", "train-000000.tar", "train-000001.tar", "train-notes.txt"]


@pytest.mark.parametrize("arguments, words", [
    (("train", 0), "samples_per_shard"), (("a/b", 1), "prefix"), (("train", 1, "gif"), "gif"),
])
def test_wrong_arguments(tmp_path, make_sample, arguments, words):
    with pytest.raises(ValueError, match=words):
        write_shards([make_sample(1)], str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_no_sample_and_repeated_key(tmp_path, make_sample):
    with pytest.raises(ValueError, match="no sample"):
        write_shards([], str(tmp_path), "train", 1)
    with pytest.raises(SampleError, match="twice"):
        write_shards([make_sample(1), make_sample(2), make_sample(1)], str(tmp_path), "train", 1)
    assert contents(tmp_path) == {}


def test_tars_are_byte_for_byte_those_of_webdataset(tmp_path):
    from webdataset import TarWriter

    records = [(f"{'x' * 70}/{number:03d}", {"png": bytes(number * 37), "json": b"{}" * number})
               for number in range(0, 60, 7)]
    with open(tmp_path / "theirs", "wb") as file, TarWriter(file, encoder=False, mtime=0, user=OWNER,
                                                            group=OWNER) as tar:
        for key, members in records:
            tar.write({"__key__": key, **members})
    written = write_tar(str(tmp_path / "ours"), records)
    data = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == data
    assert written == (len(records), len(data), hashlib.sha256(data).hexdigest())
    assert file_sha256(str(tmp_path / "ours")) == written.sha256
