"""A restored source continues with exactly the batches that an uninterrupted one would have given."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megavg.data.mixture import Mixture
from megavg.data.shards import PromptSource
from megavg.data.writer import write_shards


def global_batches(folder, count: int, dp_size: int = 1, state: dict | None = None, **options):
    """``count`` global batches as lists of keys, put together from ``dp_size`` ranks, and each rank's last state."""
    ranks = [PromptSource(folder, 12, 7, rank, dp_size, shuffle_buffer=9, **options) for rank in range(dp_size)]
    if state is not None:
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
    batches = []
    for _ in range(count):
        batch = [None] * 12
        for number, rank in enumerate(ranks):
            batch[number::dp_size] = [sample.key for sample in rank.next_batch()]
        batches.append(batch)
    return batches, [rank.state_dict() for rank in ranks]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7, 10, 13])  # an epoch is 40 samples: 3 1/3 batches
def test_resume_equals_uninterrupted_at_any_stop_and_any_dp_size(shard_set, stop):
    folder = shard_set(40, 7)
    expected, _ = global_batches(folder, 18)
    for before, after in ((1, 1), (2, 4), (4, 3)):
        first, states = global_batches(folder, stop, before)
        assert all(state == states[0] for state in states)
        second, _ = global_batches(folder, 18 - stop, after, states[0])
        assert first + second == expected


def test_chain_of_kills_and_changed_layouts(shard_set):
    folder = shard_set(40, 7)
    expected, _ = global_batches(folder, 16)
    seen, state = [], None
    for dp_size, count in ((1, 3), (2, 5), (4, 2), (3, 6)):
        batches, states = global_batches(folder, count, dp_size, state)
        seen, state = seen + batches, states[-1]
    assert seen == expected


def test_stop_at_the_exact_end_of_an_epoch(shard_set):
    folder = shard_set(36, 7)
    expected, _ = global_batches(folder, 9)
    _, states = global_batches(folder, 3)
    assert (states[0]["epoch"], states[0]["consumed"]) == (0, 36)
    assert global_batches(folder, 6, 1, states[0])[0] == expected[3:]


@pytest.mark.parametrize("stop", range(8))
def test_resume_with_skipped_records_and_a_torn_shard(raw_tar, record, tmp_path, stop):
    for shard in range(3):
        bad = {3: {"image": b"?"}, 5: {"expression": None}, 9: {"boxes_xyxy_px": [[3, 3, 3, 3]]}}
        raw_tar([m for i in range(14) for m in record(f"s{shard}r{i:02d}", **bad.get(i + shard, {}))], f"t{shard}.tar")
    with open(tmp_path / "t1.tar", "r+b") as file:
        file.truncate(12 * 2048 + 700)
    options = {"on_error": "skip"}
    expected, whole = global_batches(str(tmp_path), 8, **options)
    first, states = global_batches(str(tmp_path), stop, 3, **options)
    second, resumed = global_batches(str(tmp_path), 8 - stop, 2, states[0], **options)
    assert first + second == expected
    assert sorted(resumed[0]["skipped"]) == sorted(whole[0]["skipped"]) and len(whole[0]["skipped"]) >= 6


def test_counts_are_restored(raw_tar, record):
    path = raw_tar([m for i in range(20) for m in record(f"r{i:02d}", **({"image": b"?"} if i % 5 == 0 else {}))])
    source = PromptSource(path, 4, 0, on_error="skip")
    for _ in range(5):
        source.next_batch()
    fresh = PromptSource(path, 4, 0, on_error="skip")
    fresh.load_state_dict(source.state_dict())
    assert fresh.skipped == source.skipped == {"broken image": 4}


def test_a_finite_source_resumes_too(shard_set):
    folder = shard_set(40, 7)
    expected, _ = global_batches(folder, 3, infinite=False)
    rest = [f"s{i:05d}" for i in range(40)]
    for key in sum(expected, []):
        rest.remove(key)
    _, states = global_batches(folder, 2, infinite=False)
    source = PromptSource(folder, 12, 7, shuffle_buffer=9, infinite=False)
    source.load_state_dict(states[0])
    found = [[sample.key for sample in batch] for batch in source]
    assert found[:1] == expected[2:] and len(found) == 2 and sorted(found[1]) == rest
    ended = PromptSource(folder, 4, 7, 1, 2, shuffle_buffer=9, infinite=False)
    ended.load_state_dict(source.state_dict())
    assert list(ended) == []


def test_a_failed_batch_does_not_move_the_saved_position(raw_tar, record):
    path = raw_tar([m for i in range(8) for m in record(f"r{i}", **({"image": b"?"} if i == 6 else {}))])
    source = PromptSource(path, 4, 0, shuffle_buffer=1)
    source.next_batch()
    state = source.state_dict()
    with pytest.raises(ValueError, match="broken image"):
        source.next_batch()
    assert source.state_dict() == state


def test_moved_shards_are_accepted_and_other_shards_seed_or_buffer_refused(shard_set, tmp_path):
    folder = shard_set(40, 7)
    expected, _ = global_batches(folder, 4)
    _, states = global_batches(folder, 2)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert global_batches(str(tmp_path / "elsewhere"), 2, 2, states[0])[0] == expected[2:]
    for changes, word in (({"seed": 8}, "seed: saved 7, now 8"), ({"shuffle_buffer": 10}, "shuffle_buffer")):
        options = {"seed": 7, "shuffle_buffer": 9, **changes}
        with pytest.raises(ValueError, match=word):
            PromptSource(folder, 12, **options).load_state_dict(states[0])
    os.remove(os.path.join(folder, "train-000001.tar"))
    with pytest.raises(ValueError, match="num_shards: saved 6, now 5"):
        PromptSource(folder, 12, 7, shuffle_buffer=9).load_state_dict(states[0])


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("make", [PromptSource, lambda path, *args: Mixture({"one": (path, 1.0)}, *args)])
def test_a_set_built_anew_with_the_same_names_and_sizes_is_refused(make_sample, tmp_path, make, indexed):
    def build(start: int) -> str:
        write_shards((make_sample(start + i) for i in range(9)), str(tmp_path / "set"), "train", 4)
        if not indexed:
            os.remove(tmp_path / "set" / "index.json")
        return str(tmp_path / "set")
    folder = build(0)
    sizes = [os.path.getsize(path) for path in sorted((tmp_path / "set").glob("*.tar"))]
    state = json.loads(json.dumps(make(folder, 3, 7).state_dict()))
    build(0)
    make(folder, 3, 7).load_state_dict(state)  # the same again
    build(10)
    assert [os.path.getsize(path) for path in sorted((tmp_path / "set").glob("*.tar"))] == sizes
    with pytest.raises(ValueError, match="shards.*: saved .*rebuilt"):
        make(folder, 3, 7).load_state_dict(state)


def test_an_index_that_tells_of_another_size_is_not_trusted(shard_set):
    folder = shard_set(8, 4)
    path = os.path.join(folder, "index.json")
    with open(path) as file:
        index = json.load(file)
    for text in (json.dumps({**index, "shards": [{**shard, "bytes": 1} for shard in index["shards"]]}), "[]", "{", "7",
                 '{"shards": [{"name": [], "bytes": 1, "sha256": ""}]}'):
        with open(path, "w") as file:
            file.write(text)
        state = PromptSource(folder, 4, 7).state_dict()
        with open(os.path.join(folder, "train-000001.tar"), "r+b") as file:
            file.seek(600)  # inside of its first member
            byte = file.read(1)
            file.seek(600)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(ValueError, match="rebuilt"):
            PromptSource(folder, 4, 7).load_state_dict(state)
