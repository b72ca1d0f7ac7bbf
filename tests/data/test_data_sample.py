"""A record is read back as it was, and each kind of wrong record is refused with its own reason."""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import zlib
from collections import Counter

import pytest
from PIL import Image

from megavg.data.builder.picture import open_picture
from megavg.data.readers.base import Draft, ImageFile
from megavg.data.sample import (REASONS, RawRecord, SampleError, _to_rgb, check_sample, decode_image, parse_record,
                                record_json, with_image)
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
    ({"task": "detection", "labels": ["a<|im_end|>"]}, "control token", "im_end"),
    ({"task": "classification", "labels": ["a", "<|vision_start|>"], "boxes_xyxy_px": []}, "control token", "vision"),
    ({"expression": "x \ud800"}, "bad json", "surrogate"),
    ({"id": "\udcff"}, "bad json", "surrogate"),
    ({"task": "detection", "labels": ["\udfff"]}, "bad json", "surrogate"),
    ({"note": [{"\ud83d": 1}]}, "bad json", "surrogate"),
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


def deep_grey(values: list[int]) -> bytes:
    """A PNG of 16-bit grey, 20 x 10, by the format's definition: its first pixels hold ``values``."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    pixels = values + [0] * (200 - len(values))
    rows = b"".join(b"\0" + struct.pack(">20H", *pixels[start:start + 20]) for start in range(0, 200, 20))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 10, 16, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bit_grey_keeps_its_upper_8_bits(raw_tar, record):
    values = [0, 255, 256, 30000, 0x7FFF, 0xFF00, 0xFFFF]
    image = read_one(raw_tar(record("k", deep_grey(values)))).image
    assert [image.getpixel((x, 0)) for x in range(7)] == [(value >> 8,) * 3 for value in values]


@pytest.mark.parametrize("mode, pixel, expected", [
    ("L", 200, (200, 200, 200)), ("LA", (200, 9), (200, 200, 200)), ("RGBA", (1, 2, 3, 9), (1, 2, 3)),
    ("1", 1, (255, 255, 255))])
def test_8_bit_modes_keep_their_colours(raw_tar, record, mode, pixel, expected):
    buffer = io.BytesIO()
    Image.new(mode, (20, 10), pixel).save(buffer, "PNG")
    assert read_one(raw_tar(record("k", buffer.getvalue()))).image.getpixel((3, 3)) == expected


def test_a_mode_without_exact_meaning_in_8_bits_is_refused():
    with pytest.raises(ValueError, match="mode 'F'"):
        _to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 6, 8, 9])
def test_a_rotated_picture_is_refused_where_asked(suffix, orientation):
    buffer = io.BytesIO()
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix), exif=exif)
    assert decode_image(buffer.getvalue(), 20, 10, "s", "k").size == (20, 10)
    if orientation in (2, 3, 6, 8):
        with pytest.raises(SampleError, match=f"s: sample 'k': rotated picture: .*orientation is {orientation}:.*save"):
            decode_image(buffer.getvalue(), 20, 10, "s", "k", check_orientation=True)
    else:
        assert decode_image(buffer.getvalue(), 20, 10, "s", "k", check_orientation=True).size == (20, 10)


def test_damaged_exif_is_no_rotation():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(buffer.getvalue(), 20, 10, "", "", check_orientation=True).size == (20, 10)


def test_a_draft_with_a_rotated_picture_is_refused(tmp_path):
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "r.jpg", exif=exif)
    draft = Draft("rows: 1", "k", ImageFile(str(tmp_path / "r.jpg")),
                  {"expression": "it", "boxes_xyxy_px": [[1, 2, 5, 6]]})
    for load in (Draft.load, open_picture):
        with pytest.raises(SampleError) as caught:
            load(draft)
        assert caught.value.reason == "rotated picture" and caught.value.reason in REASONS
        assert "r.jpg" in str(caught.value)


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
    ({"meta": {"a": ["\ud800"]}}, "bad json"),
    ({"expression": "\ud800"}, "bad json"),
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
    caught.value.__str__().encode()  # can be written to a log


def test_record_json_refuses_a_lone_surrogate(make_sample):
    for sample in (make_sample(1, expression="\ud800"), make_sample(1, meta={"\udfff": 1})):
        with pytest.raises(SampleError, match="bad json"):
            record_json(sample)


def test_surrogates_are_skipped_in_each_spelling(raw_tar, record):
    (name, data), image = record("b", expression="xyz")
    raw = data.replace(b"xyz", b"\xed\xa0\x80")  # UTF-8 of half a pair: json takes it
    path = raw_tar([*record("a", expression="whole \U0001f600"), (name, raw), image, *record("c", expression="\ud83d")])
    skipped = Counter()
    assert [s.expression for s in iterate_all(path, "skip", skipped=skipped)] == ["whole \U0001f600"]
    assert skipped == {"bad json": 2}


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(SampleError("a.tar", "k", "bad json", "why")))
    assert str(error) == "a.tar: sample 'k': bad json: why" and error.reason == "bad json"
