"""ScreenSpot v1, v2 and Pro, written here from the definitions that the readers' sources give."""

from __future__ import annotations

import json

import pytest

from megavg.data.readers.screenspot import read
from megavg.data.sample import SampleError, check_sample

ROW = {"img_filename": "web_1.png", "bbox": [4, 5, 20, 10], "instruction": "view the details", "data_type": "text",
       "data_source": "shop"}
PRO = {"img_filename": "word_windows/shot.png", "bbox": [4, 5, 24, 15], "instruction": "bold", "instruction_cn": "粗体",
       "id": "word_windows_0", "application": "word", "platform": "windows", "img_size": [40, 30],
       "ui_type": "icon", "group": "Office"}


@pytest.fixture
def folder(tmp_path, picture):
    """Factory: JSON files by path, beside pictures for all three versions; returns the folder."""
    def write(files: dict) -> str:
        for place in ("screenspot_imgs/web_1.png", "screenspotv2_image/web_1.png", "images/word_windows/shot.png"):
            picture(place)
        for name, rows in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(rows if isinstance(rows, str) else json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return str(tmp_path)
    return write


def test_v1(folder):
    rows = {f"screenspot_{name}.json": [ROW, {**ROW, "data_type": "icon"}] for name in ("web", "mobile", "desktop")}
    samples = [draft.load() for draft in read(folder(rows))]
    assert [s.meta["platform"] for s in samples] == ["desktop"] * 2 + ["mobile"] * 2 + ["web"] * 2
    assert samples[0].boxes_xyxy_px == ((4.0, 5.0, 24.0, 15.0),) and samples[0].task == "point"
    assert samples[5].meta == {"dataset": "screenspot", "platform": "web", "data_type": "icon", "data_source": "shop",
                               "image": "web_1.png"}
    assert len({s.key for s in samples}) == 6
    for sample in samples:
        check_sample(sample)


def test_v2_and_one_file(folder):
    root = folder({"screenspot_web_v2.json": [ROW], "readme.json": {"not": "rows"}})
    (draft,) = read(root)
    assert draft.load().meta["dataset"] == "screenspot-v2" and "screenspotv2_image" in str(draft.image)
    assert [d.key for d in read(root + "/screenspot_web_v2.json")] == [draft.key]


def test_pro(folder):
    root = folder({"annotations/word_windows.json": [PRO, {**PRO, "ui_type": "text"}]})
    samples = [draft.load() for draft in read(root + "/annotations")]
    assert samples[0].boxes_xyxy_px == ((4.0, 5.0, 24.0, 15.0),) and samples[0].expression == "bold"
    assert samples[0].meta == {"dataset": "screenspot-pro", "platform": "windows", "data_type": "icon",
                               "group": "Office", "application": "word", "source_id": "word_windows_0",
                               "image": "word_windows/shot.png"}
    assert [d.load().expression for d in read(root + "/annotations", language="cn")] == ["粗体", "粗体"]


def test_the_version_is_certain_or_has_to_be_said(folder):
    root = folder({"screenspot_web.json": [ROW], "screenspot_web_v2.json": [ROW], "other/all.json": [ROW],
                   "pro/screenspot_web.json": [PRO]})
    with pytest.raises(ValueError, match="several versions of ScreenSpot .screenspot_web.json: v1, screenspot_web_v2"):
        next(read(root))
    assert [d.load().meta["dataset"] for d in read(root, version="v1")] == ["screenspot"]
    assert [d.load().meta["dataset"] for d in read(root, version="v2")] == ["screenspot-v2"]
    with pytest.raises(ValueError, match="cannot tell the version.*say version=v1, v2 or pro"):
        next(read(root + "/other/all.json"))
    with pytest.raises(ValueError, match="is named screenspot_mobile.json.*the platform stands in the name"):
        next(read(root + "/other/all.json", version="v1"))
    with pytest.raises(ValueError, match="cannot tell the version"):
        next(read(root + "/pro/screenspot_web.json"))
    (draft,) = read(root + "/pro/screenspot_web.json", version="pro", image_root=root + "/images")
    assert draft.load().meta["application"] == "word"


@pytest.mark.parametrize("change, words", [
    ({"bbox": [4, 5, 50, 10]}, "box outside image"), ({"bbox": [4, 5, 0, 10]}, "empty box"),
    ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "smaller than a pixel"), ({"bbox": None}, "four finite numbers"),
    ({"img_filename": "gone.png"}, "missing image"), ({"img_filename": None}, "missing field"),
    ({"instruction": " "}, "expression must be a text"), ({"data_type": "video"}, "text or icon, got 'video'"),
])
def test_a_bad_row_is_named_and_spoils_no_other(folder, change, words):
    drafts = list(read(folder({"screenspot_web.json": [ROW, {**ROW, **change}, "oops"]})))
    assert len(drafts) == 3 and drafts[0].load().expression == "view the details"
    with pytest.raises(SampleError) as caught:
        drafts[1].load()
    assert words in str(caught.value) and "screenspot_web.json: item 1" in str(caught.value)
    with pytest.raises(SampleError, match="missing field: ScreenSpot v1 needs img_filename, bbox"):
        drafts[2].load()


@pytest.mark.parametrize("change, words", [
    ({"img_size": [41, 30]}, "size mismatch"), ({"img_size": 41}, "img_size must be"),
    ({"bbox": [4, 5, 44, 15]}, "box outside image"), ({"group": ...}, "ScreenSpot pro needs group")])
def test_a_bad_row_of_pro(folder, change, words):
    row = {name: value for name, value in {**PRO, **change}.items() if value is not ...}
    root = folder({"annotations/word.json": [PRO, row]})
    with pytest.raises(SampleError, match=words):
        list(read(root + "/annotations"))[1].load()


@pytest.mark.parametrize("files, options, words", [
    ({"screenspot_web.json": "{"}, {}, "cannot read annotations"),
    ({"screenspot_web.json": {}}, {}, "JSON list of rows"),
    ({"screenspot_web.json": [ROW]}, {"version": "v3"}, "version='v3' is none of auto, v1, v2, pro"),
    ({"screenspot_web.json": [ROW]}, {"language": "cn"}, "English instructions only"),
    ({"screenspot_web.json": [ROW]}, {"image_root": "gone"}, "found no folder of the pictures.*gone.*image_root"),
    ({}, {}, "holds no .json file"),
])
def test_what_is_told_at_once(folder, files, options, words):
    with pytest.raises(ValueError, match=words):
        next(read(folder(files), **options))
