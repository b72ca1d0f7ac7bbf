"""A set is walked through once: every sample is seen by all ranks, dealt out fairly, and nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile

import pytest

from megavg.data.sample import SampleError
from megavg.data.scenes import scenes
from megavg.data.writer import write_shards
from megavg.evaluation.reader import SetReader, check_index, indexed_count, pictures_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """17 scenes in shards of 5, the n-th with meta n and split even or odd."""
    out = tmp_path_factory.mktemp("reader")
    samples = [dataclasses.replace(sample, meta={"n": i, "split": "odd" if i % 2 else "even"})
               for i, sample in enumerate(scenes(17, seed=3))]
    write_shards(samples, str(out), "set", 5)
    return str(out)


def names(samples) -> list[tuple[str, str]]:
    return [(sample.shard, sample.key) for sample in samples]


def read(shards, num_ranks: int = 1, **options) -> tuple[list[SetReader], list[list]]:
    """The readers of all ranks, and what each handed out."""
    readers = [SetReader(shards, rank, num_ranks, **options) for rank in range(num_ranks)]
    return readers, [list(reader) for reader in readers]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 20])
def test_every_sample_goes_to_one_rank_and_all_see_the_same_set(folder, num_ranks):
    (one,), (whole,) = read(folder)
    readers, parts = read(folder, num_ranks)
    assert sorted(names(sample for part in parts for sample in part)) == sorted(names(whole)) and len(whole) == 17
    assert all(names(reader.samples) == names(one.samples) == names(whole) for reader in readers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(sample.image is not None for part in parts for sample in part)
    assert all(sample.image is None for sample in readers[0].samples)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_answered_is_not_read_again_and_the_rest_is_dealt_out_fairly(folder, num_ranks):
    (one,), _ = read(folder)
    answered = set(names(one.samples)[::2])  # every sample that the first of two ranks had
    readers, parts = read(folder, num_ranks, answered=answered)
    assert sorted(names(sample for part in parts for sample in part)) == sorted(set(names(one.samples)) - answered)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert names(readers[0].samples) == names(one.samples)


def test_limit_counts_samples_of_the_set(folder):
    (reader,), (found,) = read(folder, limit=7)
    assert [sample.meta["n"] for sample in found] == list(range(7)) and len(reader.samples) == 7


@pytest.mark.parametrize("where, expected", [
    ({"split": "odd"}, list(range(1, 17, 2))), ({"n": [3, 4, 99]}, [3, 4]), ({"split": "odd", "n": [3, 4]}, [3]),
    ({"n": 5}, [5]), ({"colour": "red"}, []),
])
def test_where(folder, where, expected):
    (reader,), (found,) = read(folder, where=where)
    assert [sample.meta["n"] for sample in found] == expected and reader.num_filtered == 17 - len(expected)


def test_samples_with_boxes_may_be_asked_as_points(folder):
    _, (found,) = read(folder, as_task="point")
    assert {sample.task for sample in found} == {"point"}


@pytest.mark.parametrize("task, boxes", [("detection", True), ("detection", False), ("classification", False)])
def test_other_tasks_cannot_be_asked_as_points(folder, tmp_path, task, boxes):
    def as_other(fields: dict) -> dict:
        fields = {key: value for key, value in fields.items() if boxes or "box" not in key}
        labels = ["thing"] * len(fields["boxes_xyxy_px"]) if boxes else ["thing"] if task == "classification" else []
        return {**fields, "task": task, "labels": labels, **({} if boxes else {"boxes_xyxy_px": []})}

    shard = change(f"{folder}/set-000000.tar", tmp_path / "a.tar", as_other)
    assert [sample.task for sample in read(shard)[1][0]].count(task) == 1, "the record itself is in order"
    with pytest.raises(ValueError, match=f"a.tar: sample .* is of task '{task}', but the set's task: point takes "
                                         "samples of rec and point alone; leave the set's task empty"):
        read(shard, as_task="point", on_error="skip")


def change(shard, out, change_json=lambda fields: fields, change_picture=lambda data: data, place: int = 1):
    """A copy of a tar whose ``place``-th record is changed."""
    with tarfile.open(shard) as old, tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as new:
        for number, member in enumerate(old.getmembers()):
            data = old.extractfile(member).read()
            if number // 2 == place:
                data = json.dumps(change_json(json.loads(data))).encode() if member.name.endswith(".json") else \
                    change_picture(data)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return str(out)


def test_a_broken_picture_is_known_to_its_owner_and_left_out_by_all(folder, tmp_path):
    shard = change(f"{folder}/set-000000.tar", tmp_path / "a.tar", change_picture=lambda data: data[:300])
    readers, parts = read(shard, 2, on_error="skip")
    assert [len(part) for part in parts] == [3, 1] and [len(reader.samples) for reader in readers] == [5, 5]
    assert [len(reader.skipped_entries()) for reader in readers] == [0, 1]
    entries = {entry for reader in readers for entry in reader.skipped_entries()}
    assert entries == {(shard, 1, readers[0].samples[1].key, "broken image")}
    assert readers[0].left_out(entries) == {names(readers[0].samples)[1]}
    with pytest.raises(SampleError, match="broken image"):
        read(shard, 2)


def test_a_wrong_record_is_known_to_all(folder, tmp_path):
    shard = change(f"{folder}/set-000000.tar", tmp_path / "a.tar", lambda fields: {**fields, "width": 0})
    readers, parts = read(shard, 2, on_error="skip")
    assert [len(reader.samples) for reader in readers] == [4, 4] and sum(map(len, parts)) == 4
    assert readers[0].skipped_entries() == readers[1].skipped_entries() and readers[0].left_out(
        readers[0].skipped_entries()) == set()
    with pytest.raises(SampleError, match="width must be a whole number"):
        read(shard)


def test_two_records_of_one_name_are_refused(folder, tmp_path):
    """Their answers could not be told apart: one would stand for both."""
    (one,), _ = read(folder)
    shard = change(f"{folder}/set-000000.tar", tmp_path / "a.tar",
                   lambda fields: {**fields, "id": one.samples[0].key})
    with pytest.raises(SampleError, match="two records of this shard have this key"):
        read(shard)
    (reader,), (found,) = read(shard, on_error="skip")
    assert len(found) == 4 and reader.skips.counts == {"bad key": 1}


def test_too_many_left_out(folder, tmp_path):
    shard = change(f"{folder}/set-000000.tar", tmp_path / "a.tar", lambda fields: {})
    with pytest.raises(ValueError, match="more than max_skipped=0"):
        read(shard, on_error="skip", max_skipped=0)


def test_a_torn_shard(folder, tmp_path):
    torn = tmp_path / "torn.tar"
    with open(f"{folder}/set-000000.tar", "rb") as whole:
        torn.write_bytes(whole.read()[:9_000])
    with pytest.raises(SampleError, match="torn shard"):
        read(str(torn))
    (reader,), (found,) = read(str(torn), on_error="skip")
    assert 0 < len(found) < 5 and reader.skips.counts == {"torn shard": 1} and len(reader.samples) == len(found)


def test_pictures_of_some_samples(folder):
    (reader,), (found,) = read(folder)
    wanted = [found[i] for i in (0, 6, 16)]
    pictures = pictures_of(folder, [*names(wanted), ("no.tar", "no")])
    assert set(pictures) == set(names(wanted))
    assert all(pictures[sample.shard, sample.key].tobytes() == sample.image.tobytes() for sample in wanted)
    assert pictures_of(folder, []) == {}


def test_the_index_counts_independently(folder, tmp_path):
    assert indexed_count(folder) == 17 and indexed_count(f"{folder}/set-000001.tar") == 5
    alone = tmp_path / "alone.tar"
    with open(f"{folder}/set-000000.tar", "rb") as whole:
        alone.write_bytes(whole.read())
    assert indexed_count(str(alone)) is None
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json cannot be read .*; build the shards again, or remove it"):
        indexed_count(str(alone))


def test_an_index_that_miscounts_is_told_before_anything_is_answered(folder, tmp_path):
    check_index(folder)
    shard = tmp_path / "a.tar"
    with open(f"{folder}/set-000000.tar", "rb") as whole:
        shard.write_bytes(whole.read())
    check_index(str(shard))
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"name": "a.tar", "num_samples": 6}]}))
    with pytest.raises(ValueError, match=r"a.tar holds 5 records, but the index.json beside it says 6; build the"):
        check_index(str(shard))
    shard.write_bytes(shard.read_bytes()[:9_000])
    check_index(str(shard))
