"""Weighted mixtures: which source every place takes, and that a restart and other ranks change nothing."""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import pytest

from megavg.data.mixture import Mixture
from megavg.data.shards import PromptSource
from megavg.protocols.config import ConfigError
from megavg.protocols.options import LabelNoise
from megavg.trainer.config import DataConfig
from tests.data.all_ranks import joined


@pytest.fixture
def sources(shard_set):
    """Three sources of different sizes; keys are only unique inside of one."""
    return {"cards": (shard_set(40, 7, "cards"), 3.0), "pages": ([shard_set(9, 4, "pages")], 1.0),
            "tiny": (shard_set(2, 2, "tiny"), 0.25)}


def names(batch) -> list[tuple[str, str]]:
    return [(sample.meta["mixture_source"], sample.key) for sample in batch]


def global_batches(sources, count: int, dp_size: int = 1, state: dict | None = None, **options):
    ranks = [Mixture(sources, 12, 7, rank, dp_size, shuffle_buffer=9, **options) for rank in range(dp_size)]
    for rank in ranks if state else ():
        rank.load_state_dict(json.loads(json.dumps(state)))
    batches = [joined([names(rank.next_batch()) for rank in ranks]) for _ in range(count)]
    states = [rank.state_dict() for rank in ranks]
    for rank in ranks:
        rank.close()
    assert all(state == states[0] for state in states)
    return batches, states[0]


def test_samples_name_their_source_and_come_from_its_shards(sources):
    batch = Mixture(sources, 12, 7).next_batch()
    for sample in batch:
        assert os.path.basename(os.path.dirname(sample.shard)) == sample.meta["mixture_source"]
    assert len({sample.meta["mixture_source"] for sample in batch}) > 1


def test_a_field_of_the_record_is_not_overwritten(raw_tar, record):
    path = raw_tar(record("a", data_source="ios"))  # as ScreenSpot's records have it
    (sample,) = Mixture({"web": (path, 1.0)}, 1, 0).next_batch()
    assert sample.meta == {"data_source": "ios", "mixture_source": "web"}


def test_each_source_runs_through_its_own_epochs_without_loss(sources):
    drawn = sum(global_batches(sources, 30)[0], [])
    for name, size in (("cards", 40), ("pages", 9), ("tiny", 2)):
        keys = [key for source, key in drawn if source == name]
        assert len(keys) > 2 * size
        for start in range(0, len(keys) - size + 1, size):
            assert sorted(keys[start:start + size]) == [f"s{i:05d}" for i in range(size)]


def test_the_shares_follow_the_weights(sources):
    count = 4000
    mixture = Mixture(sources, 12, 7)
    drawn = Counter(mixture.names[mixture._lane_of(place)] for place in range(count))
    for name, (_, weight) in sources.items():
        share = weight / 4.25
        assert abs(drawn[name] - count * share) < 5 * math.sqrt(count * share * (1 - share))
    other = Mixture(sources, 12, 8)
    assert [other._lane_of(p) for p in range(100)] != [mixture._lane_of(p) for p in range(100)]


def test_the_order_is_the_one_that_it_always_was(sources):
    """Saved positions belong to this order."""
    mixture = Mixture(sources, 12, 7, shuffle_buffer=9)
    first = names(mixture.next_batch())
    assert " ".join(f"{name[0]}{int(key[1:])}" for name, key in first) == "p0 c29 p1 c21 c26 c30 p7 p6 c33 c34 c32 t0"
    later = "".join(mixture.names[mixture._lane_of(place)][0] for place in range(1020, 1050))
    assert later == "cctccccccccccccccccpccpccccpcc"


def test_neither_ranks_nor_workers_nor_the_order_of_writing_change_anything(sources):
    expected, state = global_batches(sources, 8)
    for dp_size in (2, 3, 4):
        assert global_batches(sources, 8, dp_size) == (expected, state)
    assert global_batches(sources, 8, 2, num_workers=1) == (expected, state)
    assert global_batches(dict(reversed(sources.items())), 8) == (expected, state)
    scaled = {name: (shards, weight * 2) for name, (shards, weight) in sources.items()}
    assert global_batches(scaled, 8)[0] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_equals_uninterrupted_at_any_dp_size(sources, workers):
    expected, _ = global_batches(sources, 12)
    seen, state = [], None
    for dp_size, count in ((1, 3), (2, 4), (4, 1), (3, 4)):
        batches, state = global_batches(sources, count, dp_size, state, num_workers=workers)
        seen += batches
    assert seen == expected
    assert state["place"] == 144 == sum(source["samples"] for source in state["sources"].values())


def test_a_batch_of_another_size_goes_on_at_the_same_place(sources):
    expected = sum(global_batches(sources, 6)[0], [])
    _, state = global_batches(sources, 2)
    mixture = Mixture(sources, 8, 7, shuffle_buffer=9)
    mixture.load_state_dict(state)
    assert sum((names(mixture.next_batch()) for _ in range(6)), []) == expected[24:]


def test_bad_records_are_replaced_by_their_own_source(sources, raw_tar, record):
    bad = {i: {"image": b"?"} for i in range(0, 20, 3)}
    sources["damaged"] = (raw_tar([m for i in range(20) for m in record(f"r{i:02d}", **bad.get(i, {}))]), 3.0)
    whole, state = global_batches(sources, 10, on_error="skip")
    mixture = Mixture(sources, 12, 7)
    assert [name for batch in whole for name, _ in batch] == [mixture.names[mixture._lane_of(p)] for p in range(120)]
    drawn = [key for batch in whole for name, key in batch if name == "damaged"]
    assert sorted(drawn[:13]) == [f"r{i:02d}" for i in range(20) if i % 3]
    assert state["sources"]["damaged"]["skipped"] and not state["sources"]["cards"]["skipped"]
    for stop in (1, 4, 7):
        first, saved = global_batches(sources, stop, 3, on_error="skip")
        second, last = global_batches(sources, 10 - stop, 2, saved, on_error="skip")
        assert first + second == whole and last == state
    with pytest.raises(ValueError, match="broken image"):
        Mixture({"damaged": sources["damaged"]}, 12, 7, shuffle_buffer=9).next_batch()


def test_a_changed_mixture_is_refused_and_the_change_is_named(sources, shard_set):
    _, state = global_batches(sources, 2)
    cards, pages, tiny = (sources[name] for name in ("cards", "pages", "tiny"))
    for other, words in (
            ({"cards": (cards[0], 2.0), "pages": pages, "tiny": tiny}, "weight of cards: saved 3.0, now 2.0"),
            ({"cards": cards, "pages": pages}, "weight of tiny: saved 0.25, now None"),
            ({**sources, "more": tiny}, "weight of more: saved None, now 0.25"),
            ({**sources, "tiny": (shard_set(4, 2, "else"), 0.25)}, "num_shards of tiny: saved 1, now 2")):
        with pytest.raises(ValueError, match="another order of samples") as caught:
            Mixture(other, 12, 7, shuffle_buffer=9).load_state_dict(state)
        assert words in str(caught.value) and "pages" not in str(caught.value)
    with pytest.raises(ValueError, match="seed: saved 7, now 8"):
        Mixture(sources, 12, 8, shuffle_buffer=9).load_state_dict(state)
    with pytest.raises(ValueError, match="noise: saved None"):
        Mixture(sources, 12, 7, shuffle_buffer=9, noise=LabelNoise(0.5)).load_state_dict(state)
    single = PromptSource(cards[0], 12, 7, shuffle_buffer=9)
    for source, saved in ((single, state), (Mixture(sources, 12, 7, shuffle_buffer=9), single.state_dict())):
        with pytest.raises(ValueError, match="another order of samples .*weight of cards"):
            source.load_state_dict(saved)


def test_metrics_count_the_samples_of_each_source(sources):
    mixture = Mixture(sources, 12, 7, 1, 3)
    drawn = Counter(mixture.names[mixture._lane_of(place)] for place in range(24))
    mixture.next_batch(), mixture.next_batch()
    assert mixture.metrics() == {f"data/samples/{name}": drawn[name] for name in sources}
    assert PromptSource(sources["cards"][0], 4, 0).metrics() == {}


@pytest.mark.parametrize("changes, words", [
    ({}, "at least one source"), ({"a": ("nowhere.tar", 1.0)}, "source 'a': no shard matches 'nowhere.tar'"),
    ({"a": ("x.tar", 0)}, "source 'a': weight 0 must be"), ({"a": ("x.tar", math.nan)}, "weight nan"),
    ({"a": ("x.tar", math.inf)}, "weight inf"), ({"a": ("x.tar", "2")}, "weight '2'"),
    ({"a": ("x.tar", True)}, "weight True")])
def test_wrong_sources(changes, words):
    with pytest.raises(ValueError, match=words):
        Mixture(changes, 4, 0)


def test_the_configuration_takes_shards_or_a_mixture():
    data = DataConfig(mixture={"a": {"shards": ["a.tar", "b.tar"], "weight": 2.0}, "b": {"shards": ["c.tar"]}})
    assert {name: (source.shards, source.weight) for name, source in data.sources().items()} == {
        "a": (["a.tar", "b.tar"], 2.0), "b": (["c.tar"], 1.0)}
    assert data.all_shards() == ["a.tar", "b.tar", "c.tar"]
    assert DataConfig(["x.tar"]).all_shards() == ["x.tar"] and DataConfig(["x.tar"]).sources() == {}


@pytest.mark.parametrize("options, words", [
    ({}, "one of them must not be empty"),
    ({"shards": ["a.tar"], "mixture": {"a": {"shards": ["b.tar"]}}}, "not both"),
    ({"mixture": {"a": {"shards": ["b.tar"], "wieght": 2}}}, "data.mixture.a.wieght.*did you mean 'weight'"),
    ({"mixture": {"a": {"shards": "b.tar"}}}, "data.mixture.a.shards: expected a list"),
    ({"mixture": {"a": {"weight": 1}}}, "missing option data.mixture.a.shards"),
    ({"mixture": {"a": {"shards": []}}}, "data.mixture.a: expected one or more shards"),
    ({"mixture": {"a": {"shards": ["b.tar"], "weight": 0}}}, "weight above 0"),
    ({"mixture": {"a b": {"shards": ["b.tar"]}}}, "the name 'a b'"),
    ({"mixture": {"a": ["b.tar"]}}, "data.mixture.a: expected a section")])
def test_wrong_configurations(options, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**options)
