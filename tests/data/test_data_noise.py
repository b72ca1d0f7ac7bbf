"""Label noise: how much, where the wrong boxes lie, and that it depends on a sample's name alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.data.noise import add_noise
from megavg.data.sample import SampleError, check_boxes, check_labels
from megavg.data.shards import PromptSource, iterate_all
from megavg.ops.boxes import iou
from megavg.protocols.options import LabelNoise
from megavg.protocols.sample import Sample


def bare(boxes, width=100, height=80, key="k", shard="a/b.tar", expression="it", **meta) -> Sample:
    return Sample(key, shard, None, width, height, expression, tuple(tuple(map(float, b)) for b in boxes), meta)


def asking(task: str, boxes, labels, expression="king, queen, ace", key="k", **meta) -> Sample:
    """A sample of another task than "rec"."""
    return dataclasses.replace(bare(boxes, key=key, expression=expression, **meta), task=task, labels=tuple(labels))


def contents(sample: Sample) -> tuple:
    """Everything but the folder and the picture."""
    return sample.key, sample.expression, sample.boxes_xyxy_px, json.dumps(sample.meta, sort_keys=True)


@st.composite
def pictures(draw):
    """An image size and one to five boxes inside, whole numbers or not."""
    width, height = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    whole = draw(st.booleans())

    def side(length):
        numbers = st.integers(0, length) if whole else st.floats(0, length, width=32)
        return draw(st.tuples(numbers, numbers).filter(lambda ends: abs(ends[0] - ends[1]) >= 1e-3).map(sorted))

    boxes = []
    for _ in range(draw(st.integers(1, 5))):
        (x0, x1), (y0, y1) = side(width), side(height)
        boxes.append((x0, y0, x1, y1))
    return width, height, boxes


@settings(max_examples=400, deadline=None)
@given(pictures(), st.integers(0, 5))
def test_wrong_boxes_lie_inside_and_touch_no_true_one(picture, seed):
    width, height, boxes = picture
    sample = bare(boxes, width, height)
    try:
        noisy = add_noise(sample, LabelNoise(1.0, seed))
    except SampleError as error:
        assert error.reason == "no room for noise"
        return
    assert check_boxes(noisy.boxes_xyxy_px, width, height, "", "") == noisy.boxes_xyxy_px
    assert len(noisy.boxes_xyxy_px) == len(boxes)
    for (x0, y0, x1, y1), old in zip(noisy.boxes_xyxy_px, sample.boxes_xyxy_px):
        across, down = (x1 - x0) / (old[2] - old[0]), (y1 - y0) / (old[3] - old[1])
        assert across <= 1 + 1e-6 and across == pytest.approx(down, rel=1e-6)
        for a0, b0, a1, b1 in sample.boxes_xyxy_px:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0
    assert noisy.meta == {"noisy": True, "clean_boxes_xyxy_px": [list(box) for box in sample.boxes_xyxy_px]}


def test_the_size_stays_where_there_is_room_and_every_place_is_reached():
    """On a 10 x 8 image around a 2 x 2 box at (4, 3), whose shifted copies cannot start in the open (2, 6) x (1, 5)."""
    corners = []
    for key in range(4000):
        (x0, y0, x1, y1), = add_noise(bare([(4, 3, 6, 5)], 10, 8, str(key)), LabelNoise(1.0)).boxes_xyxy_px
        assert (x1 - x0, y1 - y0) == pytest.approx((2, 2))
        corners.append((x0, y0))
    free = 8 * 6 - 4 * 4
    counts = Counter((int(x), int(y)) for x, y in corners)
    cells = {(x, y) for x in range(8) for y in range(6) if not (2 <= x < 6 and 1 <= y < 5)}
    assert set(counts) == cells
    expected, spread = 4000 / free, math.sqrt(4000 / free * (1 - 1 / free))
    assert all(abs(counts[cell] - expected) < 5 * spread for cell in cells)


def test_a_box_shrinks_into_the_room_there_is():
    (x0, y0, x1, y1), = add_noise(bare([(0, 0, 80, 80)]), LabelNoise(1.0)).boxes_xyxy_px
    assert x0 >= 80 and x1 - x0 == pytest.approx(y1 - y0) and 20 * 0.9 <= x1 - x0 <= 20
    (x0, y0, x1, y1), = add_noise(bare([(0, 0, 30, 80)]), LabelNoise(1.0)).boxes_xyxy_px
    assert x0 >= 30 and (x1 - x0, y0, y1) == pytest.approx((30, 0, 80)), "a whole side of the image keeps its length"


@pytest.mark.parametrize("boxes", [[(0, 0, 100, 80)], [(0, 0, 50, 80), (50, 0, 100, 80)], [(0.5, 0.5, 99.5, 79.5)]])
def test_no_room(boxes):
    with pytest.raises(SampleError, match="b.tar: sample 'k': no room for noise"):
        add_noise(bare(boxes), LabelNoise(1.0))


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_the_share_of_noisy_samples(probability):
    count = 5000
    flags = [add_noise(bare([(1, 1, 9, 9)], key=f"s{i}"), LabelNoise(probability)).meta["noisy"] for i in range(count)]
    assert set(flags) == {True, False}
    assert abs(sum(flags) - count * probability) < 5 * math.sqrt(count * probability * (1 - probability))
    more = [add_noise(bare([(1, 1, 9, 9)], key=f"s{i}"), LabelNoise(0.95)).meta["noisy"] for i in range(count)]
    assert all(high or not low for low, high in zip(flags, more)), "more noise adds to the samples that had some"


def test_probability_zero_and_one():
    samples = [bare([(1, 1, 9, 9)], key=f"s{i}", kind="x") for i in range(200)]
    assert all(add_noise(sample, LabelNoise(0.0, 3, ("a", "b"))) is sample for sample in samples)
    assert all(add_noise(sample, LabelNoise(1.0)).meta["noisy"] is True for sample in samples)


def test_a_clean_sample_only_gets_its_flag():
    sample = next(s for s in (bare([(1, 1, 9, 9)], key=f"s{i}", kind="x", noisy=None) for i in range(99))
                  if not add_noise(s, LabelNoise(0.5)).meta["noisy"])
    clean = add_noise(sample, LabelNoise(0.5))
    assert clean.meta == {"kind": "x", "noisy": False} and clean.boxes_xyxy_px == sample.boxes_xyxy_px


def test_noise_depends_on_seed_shard_name_and_key_alone():
    def boxes(seed=0, **changes):
        return add_noise(bare([(1, 1, 9, 9)], **changes), LabelNoise(1.0, seed)).boxes_xyxy_px

    assert boxes() == boxes(shard="elsewhere/b.tar") == boxes(expression="that")
    assert len({boxes(), boxes(1), boxes(key="l"), boxes(shard="a/c.tar")}) == 4


def test_what_is_noisy_already_stays_as_it_is():
    sample = bare([(1, 1, 9, 9)], noisy=True, clean_boxes_xyxy_px=[[20, 20, 30, 30]])
    for probability in (0.0, 0.1, 1.0):
        after = add_noise(sample, LabelNoise(probability))
        assert after.meta == sample.meta and after.boxes_xyxy_px == sample.boxes_xyxy_px


def test_classes():
    noise = LabelNoise(1.0, 0, ("cat", "dog", "cow"))
    seen = Counter()
    for i in range(300):
        asked = add_noise(bare([(1, 1, 9, 9)], key=f"s{i}", expression="cat", label="cat"), noise)
        assert asked.meta["clean_label"] == "cat" and asked.expression == asked.meta["label"]
        seen[asked.meta["label"]] += 1
        other = add_noise(bare([(1, 1, 9, 9)], key=f"s{i}", expression="the pet", label="cat"), noise)
        assert other.expression == "the pet" and other.meta["label"] == asked.meta["label"]
    assert set(seen) == {"dog", "cow"} and min(seen.values()) > 100
    assert "label" not in add_noise(bare([(1, 1, 9, 9)]), noise).meta
    assert add_noise(bare([(1, 1, 9, 9)], label=3), noise).meta["label"] == 3
    assert add_noise(bare([(1, 1, 9, 9)], label="cat"), LabelNoise(1.0)).meta["label"] == "cat"
    assert add_noise(bare([(1, 1, 9, 9)], label="ape"), noise).meta["label"] in noise.classes


def test_a_detection_gets_wrong_boxes_and_wrong_classes():
    boxes, seen = [(1, 1, 9, 9), (40, 40, 60, 70), (80, 5, 95, 20)], Counter()
    for i in range(200):
        sample = asking("detection", boxes, ("king", "queen", "king"), key=f"s{i}")
        noisy = add_noise(sample, LabelNoise(1.0))
        assert len(noisy.boxes_xyxy_px) == len(noisy.labels) == 3 and noisy.expression == sample.expression
        assert all(iou(wrong, true) == 0 for wrong in noisy.boxes_xyxy_px for true in sample.boxes_xyxy_px)
        assert all(wrong != right for wrong, right in zip(noisy.labels, sample.labels))
        assert noisy.meta == {"noisy": True, "clean_boxes_xyxy_px": [list(map(float, box)) for box in boxes],
                              "clean_labels": ["king", "queen", "king"]}
        assert noisy == add_noise(sample, LabelNoise(1.0)) != add_noise(sample, LabelNoise(1.0, 1))
        seen.update(noisy.labels)
    assert set(seen) == {"king", "queen", "ace"} and min(seen.values()) > 60


def test_a_detection_of_one_class_gets_wrong_boxes_alone():
    sample = asking("detection", [(1, 1, 9, 9)], ("king",), expression="king")
    noisy = add_noise(sample, LabelNoise(1.0))
    assert noisy.labels == ("king",) and "clean_labels" not in noisy.meta
    assert iou(noisy.boxes_xyxy_px[0], (1, 1, 9, 9)) == 0 and noisy.meta["noisy"]
    assert add_noise(sample, LabelNoise(1.0, 0, ("king", "Joker"))).labels == ("Joker",)


def test_a_detection_without_objects_has_nothing_to_get_wrong():
    sample = asking("detection", [], ())
    assert add_noise(sample, LabelNoise(1.0)) == dataclasses.replace(sample, meta={"noisy": False})


def test_a_classification_gets_one_wrong_name():
    seen = Counter()
    for i in range(300):
        noisy = add_noise(asking("classification", [], ("King ", "queen"), "king, queen, ace, ten", f"s{i}", x=1),
                          LabelNoise(1.0))
        assert noisy.meta == {"noisy": True, "x": 1, "clean_labels": ["King ", "queen"]} and len(noisy.labels) == 1
        check_labels(noisy.labels, "classification", 0, "", "")
        seen.update(noisy.labels)
    assert set(seen) == {"ace", "ten"} and min(seen.values()) > 100
    given = LabelNoise(1.0, 0, ("cat", "dog"))
    assert add_noise(asking("classification", [], ("cat",), "what is it?"), given).labels == ("dog",)
    with pytest.raises(SampleError, match="no room for noise: there is no class beside .'cat'. to take; give data.noise"):
        add_noise(asking("classification", [], ("cat",), "cat"), LabelNoise(1.0))


def test_a_point_gets_a_wrong_box_like_a_referring_expression():
    sample = asking("point", [(1, 1, 9, 9)], (), "the button")
    rec = dataclasses.replace(sample, task="rec")
    noisy = add_noise(sample, LabelNoise(1.0))
    assert noisy.boxes_xyxy_px == add_noise(rec, LabelNoise(1.0)).boxes_xyxy_px and noisy.meta["noisy"]
    assert iou(noisy.boxes_xyxy_px[0], (1, 1, 9, 9)) == 0 and (noisy.task, noisy.labels) == ("point", ())


@pytest.mark.parametrize("sample", [
    asking("detection", [(1, 1, 9, 9)], ("king",)), asking("detection", [], ()), asking("point", [(1, 1, 9, 9)], ()),
    asking("classification", [], ("king",)), asking("classification", [], ("cat",), "cat")])
def test_no_task_changes_at_probability_zero(sample):
    assert add_noise(sample, LabelNoise(0.0, 3, ("a", "b"))) is sample


def test_every_task_has_its_share_of_noise():
    for task, boxes, labels in (("detection", [(1, 1, 9, 9)], ("king",)), ("classification", [], ("king",)),
                                ("point", [(1, 1, 9, 9)], ())):
        flags = [add_noise(asking(task, boxes, labels, key=f"s{i}"), LabelNoise(0.3)).meta["noisy"]
                 for i in range(2000)]
        assert abs(sum(flags) - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)
        clean = [asking(task, boxes, labels, key=f"s{i}") for i, flag in enumerate(flags) if not flag]
        assert all(add_noise(sample, LabelNoise(0.3)) == dataclasses.replace(sample, meta={"noisy": False})
                   for sample in clean)


@pytest.mark.parametrize("options, words", [
    ({"probability": -0.1}, "probability=-0.1"), ({"probability": 1.5}, "probability=1.5"),
    ({"probability": math.nan}, "probability=nan"), ({"classes": ("a",)}, "two or more"),
    ({"classes": ("a", "a", "b")}, "different"), ({"classes": ("a", "")}, "different"),
    ({"classes": ("a", "A ")}, "different")])
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        LabelNoise(**options)


NOISE = LabelNoise(0.5, 4)


def drawn(folder, count, dp_size=1, state=None, noise=NOISE):
    """The contents of ``count`` global batches, put together from the ranks, and the last state."""
    ranks = [PromptSource(folder, 12, 7, rank, dp_size, shuffle_buffer=9, noise=noise) for rank in range(dp_size)]
    batches = []
    for rank in ranks if state else ():
        rank.load_state_dict(json.loads(json.dumps(state)))
    for _ in range(count):
        batch = [None] * 12
        for number, rank in enumerate(ranks):
            batch[number::dp_size] = map(contents, rank.next_batch())
        batches += batch
    return batches, ranks[0].state_dict()


def test_noise_is_the_same_on_every_rank_in_every_epoch_and_after_a_restart(shard_set):
    folder = shard_set(40, 7)
    whole, _ = drawn(folder, 10)  # three epochs
    by_key = {}
    for sample in whole:
        assert by_key.setdefault(sample[0], sample) == sample
    noisy = [json.loads(sample[3])["noisy"] for sample in by_key.values()]
    assert len(noisy) == 40 and 8 < sum(noisy) < 32
    assert drawn(folder, 10, 2)[0] == whole
    first, state = drawn(folder, 4, 2)
    assert first + drawn(folder, 6, 3, state)[0] == whole


def test_the_pixels_belong_to_the_sample(shard_set, make_sample):
    for sample in PromptSource(shard_set(12, 5), 12, 0, noise=LabelNoise(1.0)).next_batch():
        original = make_sample(int(sample.key[1:]))
        assert sample.image.tobytes() == original.image.tobytes()
        assert sample.meta["clean_boxes_xyxy_px"] == [list(box) for box in original.boxes_xyxy_px]
        assert sample.boxes_xyxy_px != original.boxes_xyxy_px


def test_without_noise_all_is_as_before_and_evaluation_never_has_any(shard_set, make_sample):
    folder = shard_set(40, 7)
    for sample in [*PromptSource(folder, 40, 0).next_batch(), *iterate_all(folder)]:
        original = make_sample(int(sample.key[1:]))
        assert contents(sample) == contents(original)
    assert set(PromptSource(folder, 4, 0).state_dict()["fingerprint"]) == {"seed", "shuffle_buffer", "num_shards",
                                                                           "shards"}


def test_a_position_belongs_to_its_noise(shard_set):
    folder = shard_set(40, 7)
    _, without = drawn(folder, 2, noise=LabelNoise())
    _, noisy = drawn(folder, 2, noise=LabelNoise(0.5, 4, ("a", "b")))
    drawn(folder, 1, 1, without, LabelNoise(0.0, 9))
    drawn(folder, 1, 1, noisy, LabelNoise(0.5, 4, ("a", "b")))
    for state, noise in ((without, NOISE), (noisy, LabelNoise()), (noisy, LabelNoise(0.5, 5, ("a", "b")))):
        with pytest.raises(ValueError, match="another order of samples .*noise: saved"):
            drawn(folder, 1, 1, state, noise)


def test_no_room_is_a_bad_record(raw_tar, record):
    full = {3: {"boxes_xyxy_px": [[0, 0, 20, 10]]}}
    path = raw_tar([m for i in range(8) for m in record(f"r{i}", **full.get(i, {}))])
    ranks = [PromptSource(path, 4, 0, rank, 2, shuffle_buffer=1, on_error="skip", noise=LabelNoise(1.0))
             for rank in range(2)]
    batches = [[sample.key for sample in rank.next_batch()] for rank in ranks]
    assert batches == [["r0", "r2"], ["r1", "r4"]]
    assert all(rank.skipped == {"no room for noise": 1} for rank in ranks)
    first, owner = (PromptSource(path, 4, 0, rank, 2, shuffle_buffer=1, noise=LabelNoise(1.0)) for rank in range(2))
    assert [sample.key for sample in first.next_batch()] == ["r0", "r2"]
    with pytest.raises(SampleError, match="r3.*no room for noise.*on_error='skip'"):
        owner.next_batch()
