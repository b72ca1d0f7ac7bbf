"""Shard lists, the global order of batches, and what happens to bad records and torn tars."""

from __future__ import annotations

import logging
import os
import random
import tracemalloc
from collections import Counter

import pytest

from megavg.data.sample import SampleError
from megavg.data.shards import PromptSource, expand_shards, iterate_all, shuffled
from megavg.data.tars import read_records


def keys(batch) -> list[str]:
    return [sample.key for sample in batch]


def drain(source: PromptSource) -> list[str]:
    return [key for batch in source for key in keys(batch)]


def test_expand_shards(tmp_path, monkeypatch):
    for name in ("b-0.tar", "b-1.tar", "a-0.tar", "a-10.tar", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    everything = ["a-0.tar", "a-10.tar", "b-0.tar", "b-1.tar"]
    assert expand_shards(["b-{0..1}.tar"]) == ["b-0.tar", "b-1.tar"]
    assert expand_shards(["b-*.tar", "a-0.tar"]) == ["b-0.tar", "b-1.tar", "a-0.tar"]
    assert [os.path.basename(path) for path in expand_shards([str(tmp_path)])] == everything
    assert expand_shards("{b,a}-0.tar") == ["b-0.tar", "a-0.tar"]
    assert expand_shards(["b-?.tar", "b-1.tar", "*.tar"]) == ["b-0.tar", "b-1.tar", "a-0.tar", "a-10.tar"]
    for wrong in ("c-*.tar", "missing.tar", "b-{0..2}.tar", "nowhere/"):
        with pytest.raises(ValueError, match="no shard matches") as caught:
            expand_shards(["a-0.tar", wrong])
        assert wrong in str(caught.value)
    with pytest.raises(ValueError, match="b-2.tar"):
        expand_shards("b-{0..2}.tar")
    with pytest.raises(ValueError, match="no shards given"):
        expand_shards([])


def test_a_folder_with_glob_characters_is_a_folder(tmp_path):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.tar").write_bytes(b"")
    assert expand_shards(str(tmp_path / "run[1]")) == [str(tmp_path / "run[1]" / "a.tar")]


def test_shuffle_buffer_holds_at_most_its_size_and_loses_nothing():
    fed = 0

    def feed():
        nonlocal fed
        for fed in range(1, 101):
            yield fed

    out = []
    for record in shuffled(feed(), 8, random.Random(1)):
        out.append(record)
        assert fed - len(out) <= 8
    assert sorted(out) == list(range(1, 101)) and out != sorted(out)
    assert list(shuffled(iter(range(9)), 1, random.Random(1))) == list(range(9))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_global_order_does_not_depend_on_the_number_of_ranks(shard_set, on_error):
    folder = shard_set(40, 7)
    whole = PromptSource(folder, 12, seed=5, shuffle_buffer=9, on_error=on_error)
    expected = [keys(whole.next_batch()) for _ in range(8)]
    assert len({tuple(batch) for batch in expected}) == 8
    for dp_size in (2, 3, 4):
        ranks = [PromptSource(folder, 12, 5, rank, dp_size, shuffle_buffer=9, on_error=on_error)
                 for rank in range(dp_size)]
        for batch in expected:
            shares = [keys(rank.next_batch()) for rank in ranks]
            assert shares == [batch[rank::dp_size] for rank in range(dp_size)]


def test_an_epoch_holds_every_sample_once_and_epochs_and_seeds_differ(shard_set):
    source = PromptSource(shard_set(40, 7), 8, seed=1, shuffle_buffer=16)
    epochs = [[key for _ in range(5) for key in keys(source.next_batch())] for _ in range(3)]
    assert all(sorted(epoch) == [f"s{i:05d}" for i in range(40)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = PromptSource(source.shards, 8, seed=2, shuffle_buffer=16)
    assert [key for _ in range(5) for key in keys(other.next_batch())] != epochs[0]


def test_samples_arrive_whole(shard_set, make_sample):
    for sample in PromptSource(shard_set(12, 5), 4, seed=0, infinite=False).next_batch():
        original = make_sample(int(sample.key[1:]))
        assert sample.image.tobytes() == original.image.tobytes()
        assert sample.boxes_xyxy_px == original.boxes_xyxy_px and os.path.isfile(sample.shard)


def test_finite_source_ends_after_the_last_full_batch(shard_set):
    source = PromptSource(shard_set(22, 7), 5, seed=1, infinite=False)
    assert len(list(source)) == 4
    with pytest.raises(StopIteration):
        source.next_batch()


@pytest.mark.parametrize("arguments, words", [
    ({"batch_size": 5, "dp_size": 2}, "batch_size=5"), ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 4, "dp_rank": 2, "dp_size": 2}, "dp_rank=2"),
    ({"batch_size": 4, "shuffle_buffer": 0}, "shuffle_buffer"),
    ({"batch_size": 4, "on_error": "ignore"}, "on_error"), ({"batch_size": 4, "max_skipped": -1}, "max_skipped"),
])
def test_wrong_arguments(shard_set, arguments, words):
    with pytest.raises(ValueError, match=words):
        PromptSource(shard_set(4, 4), seed=0, **arguments)


def damaged(record, tmp_path_tar, count: int = 30):
    """A tar of ``count`` records where 4 has no expression, 11 does not decode and 17 has its box outside."""
    broken = {4: {"expression": None}, 11: {"image": b"\x89PNG no picture"}, 17: {"boxes_xyxy_px": [[0, 0, 99, 5]]}}
    members = [member for i in range(count) for member in record(f"r{i:02d}", **broken.get(i, {}))]
    return tmp_path_tar(members, "damaged.tar"), {f"r{i:02d}" for i in range(count)} - {"r04", "r11", "r17"}


REASONS_SEEN = {"missing field": 1, "broken image": 1, "box outside image": 1}


def test_skipped_records_are_skipped_alike_on_every_rank_and_counted_once(raw_tar, record, caplog):
    path, good = damaged(record, raw_tar)
    caplog.set_level(logging.WARNING)
    whole = PromptSource(path, 6, seed=3, shuffle_buffer=10, on_error="skip")
    expected = [keys(whole.next_batch()) for _ in range(9)]  # two epochs of 27
    flat = [key for batch in expected for key in batch]
    assert set(flat[:27]) == good and set(flat[27:]) == good
    assert whole.skipped == Counter(REASONS_SEEN)
    lines = [entry.getMessage() for entry in caplog.records]
    assert len(lines) == 3
    assert all(any(key in line and path in line for line in lines) for key in ("r04", "r11", "r17"))
    ranks = [PromptSource(path, 6, 3, rank, 3, shuffle_buffer=10, on_error="skip") for rank in range(3)]
    for batch in expected:
        assert [keys(rank.next_batch()) for rank in ranks] == [batch[rank::3] for rank in range(3)]
    assert all(rank.skipped == Counter(REASONS_SEEN) for rank in ranks)


def test_raise_mode_stops_at_bad_json_everywhere_and_at_a_bad_image_on_its_owner(raw_tar, record):
    outside = raw_tar([m for i in range(4) for m in record(f"r{i}", **({"width": -1} if i == 3 else {}))], "json.tar")
    for rank in range(2):
        with pytest.raises(SampleError, match="on_error='skip'"):
            PromptSource(outside, 4, 0, rank, 2, shuffle_buffer=1).next_batch()
    image = raw_tar([m for i in range(4) for m in record(f"r{i}", **({"image": b"?"} if i == 3 else {}))], "image.tar")
    assert keys(PromptSource(image, 4, 0, 0, 2, shuffle_buffer=1).next_batch()) == ["r0", "r2"]
    with pytest.raises(SampleError, match="r3.*broken image"):
        PromptSource(image, 4, 0, 1, 2, shuffle_buffer=1).next_batch()


def test_more_than_max_skipped_stops_with_the_way_out(raw_tar, record):
    path, _ = damaged(record, raw_tar)
    assert len(drain(PromptSource(path, 1, 3, on_error="skip", max_skipped=3, infinite=False))) == 27
    with pytest.raises(ValueError, match="more than max_skipped=2.*raise max_skipped"):
        drain(PromptSource(path, 1, 3, on_error="skip", max_skipped=2, infinite=False))


def test_shards_without_a_usable_sample_do_not_loop_for_ever(raw_tar, record):
    with pytest.raises(ValueError, match="no usable sample"):
        PromptSource(raw_tar(record("a", width=-1)), 1, 0, on_error="skip").next_batch()
    with pytest.raises(ValueError, match="no usable sample"):
        PromptSource(raw_tar([], "empty.tar"), 1, 0).next_batch()


def test_a_tar_cut_anywhere_is_torn_and_never_quietly_short(raw_tar, record, tmp_path):
    path = raw_tar([member for i in range(4) for member in record(f"r{i}")])
    data = open(path, "rb").read()
    end = 4 * 2 * 2 * 512  # four records of two members, each a header and one block of data
    assert data[end - 512:end].strip(b"\0") and not data[end:].strip(b"\0")
    torn = tmp_path / "torn.tar"
    for cut in [*range(0, end + 1, 256), end + 100]:
        torn.write_bytes(data[:cut])
        seen = []
        with pytest.raises(SampleError, match="torn.tar.*torn shard") as caught:
            for found in read_records(str(torn)):
                seen.append(found)
        assert caught.value.reason == "torn shard"
        assert all(set(found.files) == {"json", "png"} for found in seen)
    torn.write_bytes(data[:end + 512])
    assert len(list(read_records(str(torn)))) == 4


def test_a_damaged_header_and_a_foreign_file_are_torn(raw_tar, record, tmp_path):
    path = raw_tar([member for i in range(4) for member in record(f"r{i}")])
    data = bytearray(open(path, "rb").read())
    data[4 * 1024 + 100] ^= 0xFF
    (tmp_path / "flip.tar").write_bytes(data)
    (tmp_path / "text.tar").write_bytes(b"this is no tar" * 100)
    for name in ("flip.tar", "text.tar"):
        with pytest.raises(SampleError, match=f"{name}.*torn shard"):
            list(read_records(str(tmp_path / name)))


def test_torn_shard_stops_or_is_skipped_and_counted_once(shard_set, caplog):
    folder = shard_set(40, 10)
    torn = os.path.join(folder, "train-000002.tar")
    with open(torn, "r+b") as file:
        file.truncate(os.path.getsize(torn) // 2)
    with pytest.raises(SampleError, match="train-000002.tar.*torn shard"):
        drain(PromptSource(folder, 1, seed=0, infinite=False))
    ranks = [PromptSource(folder, 6, 0, rank, 2, on_error="skip") for rank in range(2)]
    source = PromptSource(folder, 6, seed=0, on_error="skip")
    for _ in range(15):
        batch = keys(source.next_batch())
        assert [keys(rank.next_batch()) for rank in ranks] == [batch[0::2], batch[1::2]]
    assert source.state_dict()["epoch"] >= 2 and source.skipped == Counter({"torn shard": 1})
    assert ["torn shard" in entry.getMessage() for entry in caplog.records] == [True, True]  # rank 0 of each set, once


def test_iterate_all_keeps_the_order_and_counts(raw_tar, record, shard_set):
    assert keys(iterate_all(shard_set(15, 4))) == [f"s{i:05d}" for i in range(15)]
    path, good = damaged(record, raw_tar)
    skipped = Counter()
    assert keys(iterate_all(path, on_error="skip", skipped=skipped)) == sorted(good)
    assert skipped == Counter(REASONS_SEEN)
    with pytest.raises(SampleError, match="r04"):
        list(iterate_all(path))
    with pytest.raises(ValueError, match="on_error"):
        iterate_all(path, on_error="sometimes")


def test_memory_follows_the_buffer_not_the_shard(raw_tar, record):
    payload = bytes(200_000)
    path = raw_tar([m for i in range(150) for m in record(f"r{i:03d}") + [(f"r{i:03d}.bin", payload)]])
    source = PromptSource(path, 1, seed=0, shuffle_buffer=10, infinite=False)
    source.next_batch()  # webdataset is imported by now
    tracemalloc.start()
    assert len(drain(source)) == 149
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(payload)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_ranks_share_an_evaluation_set_without_a_gap(tmp_path, on_error):
    """Every sample once over the ranks, in the stored order."""
    from megavg.data.scenes import scenes
    from megavg.data.writer import write_shards

    write_shards(scenes(11, 5), str(tmp_path / "s"), "s", 4)
    whole = [sample.key for sample in iterate_all(str(tmp_path / "s"))]
    parts = [[sample.key for sample in iterate_all(str(tmp_path / "s"), on_error, rank=rank, num_ranks=3)]
             for rank in range(3)]
    assert len(whole) == 11 and sorted(sum(parts, [])) == sorted(whole)
    assert parts[1] == whole[1::3]
