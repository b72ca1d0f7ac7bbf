"""A record is read back as it was, and each kind of wrong record is refused with its own reason."""

from __future__ import annotations

import dataclasses
import io
import pickle

import pytest
from PIL import Image

from megavg.data.sample import REASONS, RawRecord, SampleError, check_sample, parse_record, record_json, with_image
from megavg.data.shards import iterate_all


def read_one(path: str):
    (sample,) = iterate_all(path)
    return sample


@pytest.mark.parametrize("changes, reason, words", [
    ({"boxes_xyxy_px": [[1, 2, 21, 6]]}, "box outside image", "20 x 10"),
    ({"boxes_xyxy_px": [[-0.5, 2, 5, 6]]}, "box outside image", "-0.5"),
    ({"boxes_xyxy_px": [[5, 2, 5, 6]]}, "empty box", "x1 > x0"),
    ({"boxes_xyxy_px": [[1, 2, 3, 4], [4, 6, 8, 5]]}, "empty box", "[4, 6, 8, 5]"),
    ({"boxes_xyxy_px": [[1, 2, 3]]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": [[1, 2, float("nan"), 6]]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": [[1, 2, float("inf"), 6]]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": [[1, 2, 10**400, 6]]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": [[True, 2, 5, 6]]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": [7]}, "bad json", "four finite numbers"),
    ({"boxes_xyxy_px": []}, "missing field", "at least one box"),
    ({"boxes_xyxy_px": None}, "missing field", "'boxes_xyxy_px'"),
    ({"expression": None}, "missing field", "'expression'"),
    ({"expression": "  "}, "missing field", "expression"),
    ({"expression": "a <|im_end|> b"}, "control token", "im_end"),
    ({"width": 4020, "height": 20}, "extreme aspect", "200 to 1"),
    ({"width": None}, "missing field", "'width'"),
    ({"width": 20.5}, "bad json", "width"),
    ({"height": 0}, "bad json", "height"),
    ({"width": 21}, "size mismatch", "20 x 10"),
])
def test_wrong_field_is_named(raw_tar, record, changes, reason, words):
    path = raw_tar(record("good-1", **changes))
    with pytest.raises(SampleError) as caught:
        read_one(path)
    assert caught.value.reason == reason and reason in REASONS
    assert words in str(caught.value) and path in str(caught.value) and "good-1" in str(caught.value)


@pytest.mark.parametrize("members, reason", [
    ([("a.json", b"{not json"), ("a.png", b"")], "bad json"),
    ([("a.json", b"[1, 2]"), ("a.png", b"")], "bad json"),
    ([("a.json", b"[" * 100_000), ("a.png", b"")], "bad json"),
    ([("a.json", b"\xff\xfe\xfd"), ("a.png", b"")], "bad json"),
    ([("a.png", b"")], "missing field"),
    ([("a.json", b"{}")], "missing image"),
    ([("a.json", b"{}"), ("a.txt", b"words")], "missing image"),
])
def test_wrong_members_are_named(raw_tar, members, reason):
    with pytest.raises(SampleError) as caught:
        read_one(raw_tar(members))
    assert caught.value.reason == reason and caught.value.key == "a"


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
def test_every_truncation_of_an_image_is_broken_or_complete(raw_tar, record, make_sample, suffix):
    buffer = io.BytesIO()
    picture = make_sample(1, 20, 10).image
    picture.save(buffer, {"png": "PNG", "webp": "WEBP"}.get(suffix, "JPEG"))
    whole = buffer.getvalue()
    assert read_one(raw_tar(record("k", whole, suffix))).image.size == (20, 10)
    for cut in (0, 1, len(whole) // 3, len(whole) * 2 // 3):
        with pytest.raises(SampleError) as caught:
            read_one(raw_tar(record("k", whole[:cut], suffix)))
        assert caught.value.reason == "broken image"


def test_other_formats_are_not_opened(raw_tar, record):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "BMP")
    with pytest.raises(SampleError, match="broken image"):
        read_one(raw_tar(record("k", buffer.getvalue())))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_any_mode_becomes_rgb(raw_tar, record, mode):
    buffer = io.BytesIO()
    Image.new(mode, (20, 10)).save(buffer, "PNG")
    assert read_one(raw_tar(record("k", buffer.getvalue()))).image.mode == "RGB"


def test_boxes_refer_to_stored_pixels_not_to_the_exif_orientation(raw_tar, record):
    buffer = io.BytesIO()
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # a viewer would turn it to 10 x 20
    picture.save(buffer, "JPEG", exif=exif)
    assert read_one(raw_tar(record("k", buffer.getvalue(), "jpg"))).image.size == (20, 10)


def test_missing_id_falls_back_to_the_key_and_other_fields_go_to_meta(raw_tar, record):
    sample = read_one(raw_tar(record("folder/k", id=None, source="here", flags=[1, {"a": 2}])))
    assert sample.key == "folder/k" and sample.meta == {"source": "here", "flags": [1, {"a": 2}]}


def test_json_and_back_is_equal(make_sample):
    sample = make_sample(3, boxes_xyxy_px=((0.1, 1 / 3, 23.999999999999996, 17.0), (0.0, 0.0, 24.0, 18.0)))
    buffer = io.BytesIO()
    sample.image.save(buffer, "PNG")
    record = RawRecord("", sample.key, 0, {"json": record_json(sample), "png": buffer.getvalue()})
    back = with_image(parse_record(record), record)
    assert back.image.tobytes() == sample.image.tobytes()
    assert dataclasses.replace(back, image=None) == dataclasses.replace(sample, image=None)


@pytest.mark.parametrize("changes, reason", [
    ({"key": "a.b"}, "bad key"),
    ({"key": "__meta__"}, "bad key"),
    ({"key": ""}, "bad key"),
    ({"key": "é"}, "bad key"),
    ({"meta": {"width": 3}}, "bad json"),
    ({"meta": {"a": {1, 2}}}, "bad json"),
    ({"image": None}, "missing image"),
    ({"image": Image.new("L", (24, 18))}, "missing image"),
    ({"image": Image.new("RGB", (25, 18))}, "size mismatch"),
    ({"boxes_xyxy_px": ((0.0, 0.0, 0.0, 1.0),)}, "empty box"),
])
def test_unwritable_sample_is_refused(make_sample, changes, reason):
    check_sample(make_sample(1))
    with pytest.raises(SampleError) as caught:
        check_sample(make_sample(1, **changes))
    assert caught.value.reason == reason


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(SampleError("a.tar", "k", "bad json", "why")))
    assert str(error) == "a.tar: sample 'k': bad json: why" and error.reason == "bad json"
