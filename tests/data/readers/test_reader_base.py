"""Drafts, keys and frames: what all readers build on."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavg.data.readers.base import Draft, ImageFile, broken, key_from
from megavg.data.readers.frames import FRAMES, boxes_to_px, from_xywh
from megavg.data.sample import SampleError, check_sample


@given(st.lists(st.one_of(st.integers(0, 10**12), st.text(max_size=80)), min_size=1, max_size=6))
def test_keys_are_taken_by_shards(parts):
    key = key_from(*parts)
    assert re.fullmatch(r"(?!__)[A-Za-z0-9_\-/]{1,92}", key)


@given(st.text(min_size=50, max_size=90), st.integers(0, 10**9), st.integers(0, 10**9))
def test_long_names_do_not_push_out_the_numbers(name, one, two):
    assert key_from(name, name, name, one, two).endswith(f"-{one}-{two}")


def test_a_draft_loads_pickles_and_tells_its_size(picture, tmp_path):
    draft = Draft("here", "k", ImageFile(picture("a.png")), {"expression": "it", "boxes_xyxy_px": [[1, 2, 3.5, 4]]})
    sample = pickle.loads(pickle.dumps(draft)).load()
    assert sample.image.size == (40, 30) == (sample.width, sample.height)
    assert sample.boxes_xyxy_px == ((1.0, 2.0, 3.5, 4.0),) and sample.shard == ""
    assert draft.outline().image is None and draft.outline().boxes_xyxy_px == sample.boxes_xyxy_px
    assert draft.load(draft.read()).image.tobytes() == sample.image.tobytes()
    check_sample(sample)


@pytest.mark.parametrize("call", ["read", "outline", "load"])
def test_a_broken_draft_raises_what_it_is_told(call):
    draft = broken("file: line 3", "line-3", "bad json", "no comma")
    with pytest.raises(SampleError, match="file: line 3: sample 'line-3': bad json: no comma"):
        getattr(pickle.loads(pickle.dumps(draft)), call)()


def test_a_missing_and_a_torn_picture(picture, tmp_path):
    fields = {"expression": "it", "boxes_xyxy_px": [[1, 2, 3, 4]]}
    with pytest.raises(SampleError, match="missing image: .*gone.png"):
        Draft("here", "k", ImageFile(str(tmp_path / "gone.png")), fields).load()
    whole = picture("a.png")
    with open(whole, "rb") as file:
        data = file.read()
    with open(whole, "wb") as file:
        file.write(data[:len(data) // 2])
    with pytest.raises(SampleError, match="broken image"):
        Draft("here", "k", ImageFile(whole), fields).load()


@pytest.mark.parametrize("frame, box, wanted", [
    ("pixels", [10, 20, 200, 100], [10, 20, 200, 100]),
    ("relative_1", [0.1, 0.5, 1.0, 1.0], [20, 50, 200, 100]),
    ("relative_1000", [100, 500, 1000, 1000], [20, 50, 200, 100]),
    ("relative_1_square", [0.1, 0.25, 1.0, 0.75], [20, 0, 200, 100]),
])
def test_frames(frame, box, wanted):
    assert boxes_to_px([box], frame, 200, 100, 0.0, "w", "k") == [pytest.approx(wanted)]


def test_the_square_frame_of_a_tall_picture():
    # expand2square pastes a 100 x 201 picture at x = (201 - 100) // 2 = 50
    found = boxes_to_px([[50 / 201, 0, 150 / 201, 1]], "relative_1_square", 100, 201, 0.0, "w", "k")
    assert found == [pytest.approx([0, 0, 100, 201])]


@pytest.mark.parametrize("frame, box, words", [
    ("pixels", [243, 468, 557, 745], "'relative_1000'"), ("pixels", [0.1, 0.2, 0.5, 0.9], "smaller than a pixel.*"
                                                                                         "'relative_1'"),
    ("relative_1", [100, 200, 300, 400], "'pixels' or 'relative_1000'"),
    ("relative_1000", [0.1, 0.2, 0.5, 0.9], "smaller than a pixel"),
    ("relative_1000", [100, 200, 300, 1400], "none of"), ("relative_1_square", [0.1, 0.2, 0.5, 0.9], None),
    ("relative_1_square", [0.0, 0.2, 0.5, 0.9], "'relative_1'"),
])
def test_a_box_in_the_wrong_frame_names_the_frame_that_fits(frame, box, words):
    if words is None:
        boxes_to_px([box], frame, 500, 400 if frame == "relative_1_square" else 640, 60.0, "w", "k")
        return
    with pytest.raises(SampleError, match=words):
        boxes_to_px([box], frame, 427, 640, 0.5, "w", "k")


def test_only_small_overhang_is_cut():
    assert boxes_to_px([[-0.4, 0, 40.4, 30]], "pixels", 40, 30, 0.5, "w", "k") == [[0, 0, 40, 30]]
    with pytest.raises(SampleError, match="box outside image") as caught:
        boxes_to_px([[0, 0, 40.6, 30]], "pixels", 40, 30, 0.5, "w", "k")
    assert "fit the frame" not in str(caught.value)


@given(st.sampled_from(FRAMES), st.integers(1, 5000), st.integers(1, 5000),
       st.lists(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans(), st.lists(st.integers())),
                max_size=5))
def test_rubbish_is_refused_or_left_for_the_check_of_boxes(frame, width, height, box):
    try:
        (found,) = boxes_to_px([from_xywh(box)], frame, width, height, 0.5, "w", "k")
    except SampleError as error:
        assert error.reason in ("box outside image", "empty box")
    else:
        numbers = [value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(numbers) == len(found) == 4 and all(abs(value) < 1e300 for value in numbers):
            assert found[0] >= 0 and found[1] >= 0 and found[2] <= width and found[3] <= height


@given(st.integers(1, 4000), st.integers(1, 4000), st.data())
def test_boxes_survive_the_relative_frames(width, height, data):
    x0, x1 = sorted((data.draw(st.floats(0, width)), data.draw(st.floats(0, width))))
    y0, y1 = sorted((data.draw(st.floats(0, height)), data.draw(st.floats(0, height))))
    for frame, scale in (("relative_1", 1), ("relative_1000", 1000)):
        told = [x0 / width * scale, y0 / height * scale, x1 / width * scale, y1 / height * scale]
        if max(told) > 1 or frame == "relative_1":
            (found,) = boxes_to_px([told], frame, width, height, 1e-6, "w", "k")
            assert found == pytest.approx([x0, y0, x1, y1], abs=1e-6)
