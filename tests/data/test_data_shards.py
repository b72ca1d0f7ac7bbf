"""Shard lists, the global order of batches, and what happens to bad records and torn tars."""

from __future__ import annotations

import logging
import os
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavg.data.order import shuffled
from megavg.data.sample import SampleError
from megavg.data.shards import PromptSource, expand_shards, iterate_all
from megavg.data.tars import _by_key, read_records


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


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("count", [22, 24, 3])
def test_a_finite_source_hands_out_every_sample_or_drops_the_last_short_batch(shard_set, count, on_error):
    folder = shard_set(count, 7)
    whole = list(PromptSource(folder, 8, 1, infinite=False, on_error=on_error))
    assert sorted(key for batch in whole for key in keys(batch)) == [f"s{i:05d}" for i in range(count)]
    assert [len(batch) for batch in whole] == [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    for dp_size in (2, 4):
        ranks = [PromptSource(folder, 8, 1, rank, dp_size, infinite=False, on_error=on_error)
                 for rank in range(dp_size)]
        for batch in whole:  # a rank without a sample in the last batch gets an empty list, and no error
            assert [keys(rank.next_batch()) for rank in ranks] == [keys(batch)[r::dp_size] for r in range(dp_size)]
        for rank in ranks:
            for _ in range(2):
                with pytest.raises(StopIteration):
                    rank.next_batch()
            assert rank.state_dict()["consumed"] == count
    full = PromptSource(folder, 8, 1, infinite=False, drop_last=True, on_error=on_error)
    assert [keys(batch) for batch in full] == [keys(batch) for batch in whole[:count // 8]]


def test_the_order_is_the_one_that_it_always_was(shard_set):
    """Saved positions of older runs, and published figures, belong to this order."""
    source = PromptSource(shard_set(40, 7), 12, seed=5, shuffle_buffer=9)
    order = [int(key[1:]) for _ in range(4) for key in keys(source.next_batch())]
    assert order[:44] == [14, 15, 0, 16, 1, 5, 4, 3, 17, 6, 8, 18, 12, 19, 13, 7, 28, 20, 31, 34, 33, 9, 37, 29, 11,
                          21, 35, 2, 23, 38, 25, 36, 22, 26, 32, 30, 27, 39, 24, 10, 38, 15, 35, 36]


def test_no_rank_reads_what_it_does_not_own(shard_set, record, raw_tar, tmp_path):
    """The members of the other rank's records are overwritten under its feet, and it does not notice."""
    path = raw_tar([m for i in range(8) for m in record(f"r{i}")])
    spans = [found.files for found in read_records(path)]
    status = os.stat(path)
    with open(path, "r+b") as file:
        for files in spans[1::2]:
            for span in files.values():
                file.seek(span.offset)
                file.write(b"x" * span.size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert keys(PromptSource(path, 8, 0, 0, 2, shuffle_buffer=1).next_batch()) == ["r0", "r2", "r4", "r6"]
    assert keys(iterate_all(path, rank=0, num_ranks=2)) == ["r0", "r2", "r4", "r6"]
    with pytest.raises(SampleError, match="r1.*bad json"):
        PromptSource(path, 8, 0, 1, 2, shuffle_buffer=1).next_batch()
    resumed = PromptSource(path, 2, 0, 1, 2, shuffle_buffer=1)
    resumed.load_state_dict({**resumed.state_dict(), "consumed": 4})
    with pytest.raises(SampleError, match="r5.*bad json"):
        resumed.next_batch()


def test_a_shard_that_changes_while_it_is_read_is_an_error_or_makes_no_difference(shard_set):
    first, second = expand_shards(shard_set(24, 12))
    source = PromptSource(first, 4, 0)
    seen = keys(source.next_batch())
    spans = [span for found in read_records(second) for span in found.files.values()]
    os.replace(second, first)
    assert sorted(seen + [key for _ in range(2) for key in keys(source.next_batch())]) == [
        f"s{i:05d}" for i in range(12)], "the open file is still the old one"
    with pytest.raises(OSError, match="No such file"):
        spans[0].read()
    with open(second, "wb") as file:
        file.write(bytes(20000))
    with pytest.raises(OSError, match="was changed after"):
        spans[0].read()
    source = PromptSource(first, 4, 0)
    source.next_batch()
    os.truncate(first, 600)
    with pytest.raises(SampleError, match="s000.*torn shard.*cannot be read any more.*ends inside of a member"):
        source.next_batch()


@pytest.mark.parametrize("arguments, words", [
    ({"batch_size": 5, "dp_size": 2}, "batch_size=5"), ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 4, "dp_rank": 2, "dp_size": 2}, "dp_rank=2"),
    ({"batch_size": 4, "shuffle_buffer": 0}, "shuffle_buffer"),
    ({"batch_size": 4, "on_error": "ignore"}, "on_error"), ({"batch_size": 4, "max_skipped": -1}, "max_skipped"),
    ({"batch_size": 4, "num_workers": -1}, "num_workers=-1"), ({"batch_size": 4, "shuffle_bytes": -1}, "shuffle_bytes"),
    ({"batch_size": 4, "prefetch_batches": 0}, "prefetch_batches=0"),
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


@pytest.mark.parametrize("change, reason", [({"width": -1}, "bad json"), ({"image": b"?"}, "broken image")])
def test_raise_mode_stops_at_a_bad_record_on_its_owner(raw_tar, record, change, reason):
    path = raw_tar([m for i in range(4) for m in record(f"r{i}", **(change if i == 3 else {}))])
    assert keys(PromptSource(path, 4, 0, 0, 2, shuffle_buffer=1).next_batch()) == ["r0", "r2"]
    with pytest.raises(SampleError, match=f"r3.*{reason}.*on_error='skip'"):
        PromptSource(path, 4, 0, 1, 2, shuffle_buffer=1).next_batch()


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


@pytest.mark.parametrize("opened", ["{}", "pipe:cat {}"])
def test_a_repeated_member_costs_its_record_alone(raw_tar, record, opened):
    members = [*record("a"), *record("b"), *record("b"), *record("c"), *record("d"), record("d")[1], *record("e")]
    path = opened.format(raw_tar(members))
    skipped = Counter()
    assert keys(iterate_all(path, "skip", skipped=skipped)) == ["a", "c", "e"]
    assert skipped == {"duplicate key": 2}
    with pytest.raises(SampleError, match="sample 'b': duplicate key: b.json occurs again"):
        list(iterate_all(path))
    source = PromptSource(path, 3, 0, on_error="skip")
    drawn = [key for _ in range(3) for key in keys(source.next_batch())]
    assert Counter(drawn) == {"a": 3, "c": 3, "e": 3}
    fresh = PromptSource(path, 3, 0, on_error="skip")
    fresh.load_state_dict(source.state_dict())
    assert fresh.skipped == source.skipped == {"duplicate key": 2}


@given(st.lists(st.sampled_from(["a.json", "a.PNG", "b.json", "b.jpg", "d/a.json", "d.x/a.json", "d.x/a.b.json",
                                 ".json", "noext", "a.", "__a.json"]), max_size=12))
def test_members_are_grouped_as_webdataset_groups_them(names):
    from webdataset.tariterators import group_by_keys

    try:
        expected = [(found["__key__"], {name: data for name, data in found.items() if name[:2] != "__"}) for found in
                    group_by_keys({"fname": name, "data": name.encode(), "__url__": ""} for name in names)]
    except ValueError:
        expected = None  # a repeated member: webdataset stops
    records = list(_by_key("", [(name, name.encode()) for name in names]))
    assert [record.index for record in records] == list(range(len(records)))
    if expected is None or any(record.problem for record in records):
        assert any(record.problem for record in records)
    else:
        assert [(record.key, record.files) for record in records] == expected


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
    source.next_batch()  # what it imports late is there by now
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
