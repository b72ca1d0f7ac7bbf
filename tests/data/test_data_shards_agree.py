"""Ranks that decode only their own records and tell each other of bad ones leave out what all-decode leaves out."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.data import batches, urls
from megavg.data.mixture import Mixture
from megavg.data.shards import PromptSource
from megavg.protocols.options import LabelNoise
from tests.data.all_ranks import joined, keys, write_tar
from tests.rank_threads import Exchange, in_threads

BAD = [{"image": b"?"}, {"expression": None}, {"boxes_xyxy_px": [[3, 3, 3, 3]]}, {"width": 21},
       {"boxes_xyxy_px": [[0, 0, 20, 10]]}]  # the last leaves no room for noise


def agreeing(dp_size: int, *arguments, make=PromptSource, **options):
    exchange = Exchange(dp_size)
    ranks = [make(*arguments, rank, dp_size, on_error="skip", agree=exchange.agree_of(rank), **options)
             for rank in range(dp_size)]
    return ranks, exchange


def compare(arguments: tuple, dp_size: int, num_batches: int, make=PromptSource, **options) -> None:
    """Every batch, count and state of agreeing ranks equals those of one process that decodes everything."""
    whole = make(*arguments, on_error="skip", **options)
    ranks, _ = agreeing(dp_size, *arguments, make=make, **options)
    for _ in range(num_batches):
        try:
            expected = whole.next_batch()
        except (StopIteration, ValueError) as error:
            found = in_threads(ranks, lambda rank: rank.next_batch())
            # in a pool's thread StopIteration cannot be told from others by its type alone
            assert [str(one) for one in found] == [str(error)] * dp_size
            return
        shares = in_threads(ranks, lambda rank: rank.next_batch())
        assert [error for error in shares if isinstance(error, Exception)] == []
        assert keys(joined(shares)) == keys(expected)
        assert [s.meta for s in joined(shares)] == [s.meta for s in expected]
        state = json.dumps(whole.state_dict())
        assert [json.dumps(rank.state_dict()) for rank in ranks] == [state] * dp_size
        assert all(rank.skipped == whole.skipped for rank in ranks)


@pytest.fixture
def damaged(raw_tar, record):
    """Factory of shards with a share of bad records, drawn by ``seed``."""
    def build(seed: int, sizes=(14, 9, 11), share: float = 0.3) -> list[str]:
        rng = random.Random(seed)
        paths = []
        for shard, size in enumerate(sizes):
            changes = [rng.choice(BAD) if rng.random() < share else {} for _ in range(size)]
            paths.append(raw_tar([m for i, change in enumerate(changes) for m in record(f"t{shard}r{i:02d}", **change)],
                                 f"{seed}-{shard}.tar"))
        return paths
    return build


@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_agreeing_equals_decoding_everything(damaged, dp_size):
    shards = damaged(5)
    with open(shards[1], "r+b") as file:
        file.truncate(5 * 2048 + 700)
    for noise in (LabelNoise(), LabelNoise(0.5, 1)):
        compare((shards, 12, 3), dp_size, 9, shuffle_buffer=7, noise=noise)
    compare((shards, 12, 3), dp_size, 9, shuffle_buffer=7, infinite=False)
    compare((shards, 12, 3), dp_size, 9, shuffle_buffer=7, infinite=False, drop_last=True)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_agreeing_equals_decoding_everything_on_random_damage(tmp_path_factory, data):
    """Tiny sets too, where one batch is several epochs, and sets without one good record."""
    folder = tmp_path_factory.mktemp("random")
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    good = [data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for size in sizes]
    shards = [write_tar(folder / f"{number}.tar", flags) for number, flags in enumerate(good)]
    compare((shards, 6, data.draw(st.integers(0, 3))), data.draw(st.sampled_from([2, 3])), 4,
            shuffle_buffer=data.draw(st.integers(1, 8)), infinite=data.draw(st.booleans()))


def test_a_mixture_agrees_too(damaged):
    sources = {"a": (damaged(1), 2.0), "b": (damaged(2, (5,)), 1.0), "c": (damaged(3, (1, 3), 0.0), 0.3)}
    for dp_size in (2, 3):
        compare((sources, 12, 3), dp_size, 8, make=Mixture, shuffle_buffer=7)


def test_each_rank_decodes_its_own_and_no_more(damaged, monkeypatch):
    decoded: list[str] = []
    real = batches.decode_record
    monkeypatch.setattr(batches, "decode_record", lambda record: (decoded.append(record.key), real(record))[1])
    clean = damaged(1, (48,), 0.0)
    ranks, exchange = agreeing(4, clean, 12, 0)
    for _ in range(4):
        in_threads(ranks, lambda rank: rank.next_batch())
    assert len(decoded) == 48, "each record once, by one rank"
    assert [len(sent) for sent in exchange.sent] == [4] * 4, "one exchange a batch"
    decoded.clear()
    for rank in range(4):
        PromptSource(clean, 12, 0, rank, 4, on_error="skip").next_batch()
    assert len(decoded) == 4 * 12, "what it spares"
    decoded.clear()
    ranks, _ = agreeing(4, damaged(2, (48,), 0.25), 12, 0)
    in_threads(ranks, lambda rank: rank.next_batch())
    assert len(decoded) < 3 * 12


def test_a_failure_of_one_rank_ends_all_with_its_message(damaged, monkeypatch):
    """One rank finds its copy of the URL gone; the others must not wait for it in the exchange."""
    path, = damaged(1, (24,), 0.0)
    exchange = Exchange(3)
    ranks = [PromptSource(f"pipe:test {rank} != 1 && cat {path}", 6, 0, rank, 3, on_error="skip",
                          agree=exchange.agree_of(rank)) for rank in range(3)]
    monkeypatch.setattr(urls, "RETRY_SECONDS", 0.01)
    found = in_threads(ranks, lambda rank: rank.next_batch())
    assert all(isinstance(error, ValueError) for error in found)
    assert all("pipe:test 1" in str(error) and "exit status 1" in str(error) for error in found)


def test_too_many_bad_records_end_all_ranks_alike(damaged):
    ranks, _ = agreeing(3, damaged(4, (40,), 0.5), 12, 0, max_skipped=3)
    found = in_threads(ranks, lambda rank: rank.next_batch())
    assert len({str(error) for error in found}) == 1 and "more than max_skipped=3" in str(found[0])


def test_workers_change_nothing(damaged):
    compare((damaged(6), 12, 3), 2, 8, shuffle_buffer=7, num_workers=1, prefetch_batches=1)
