"""Hugging Face data sets as parquet files, written here with pyarrow as ``datasets`` writes them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megavg.data.readers import parquet
from megavg.data.sample import SampleError, check_sample

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[3]
ASKED = {"frame": "pixels", "bbox_format": "xywh", "expression_column": "answer"}


@pytest.fixture
def write(tmp_path, picture):
    """Factory of a parquet file of ``rows``; "image" may be a picture's name, or what stands in the column."""
    def build(rows: list[dict], name: str = "data/val-00000-of-00001.parquet", row_group_size: int = 2) -> str:
        rows = [dict(row) for row in rows]
        for row in rows:
            if isinstance(row["image"], str):
                row["image"] = {"bytes": Path(picture(row["image"])).read_bytes(), "path": Path(row["image"]).name}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
        return str(path)
    return build


def row(number: int, **changes) -> dict:
    return {"image": f"{number}.png", "bbox": [1.0, 2.0, 10.5, 20.0], "answer": [f"thing {number}"], "n": number,
            **changes}


def test_rows_in_groups_and_several_texts(write, tmp_path):
    write([row(0), row(1, answer=["a", "b"]), row(2), row(3), row(4)])
    drafts = list(parquet.read(str(tmp_path / "data"), **ASKED, meta_columns=["n"]))
    samples = [pickle.loads(pickle.dumps(draft)).load() for draft in drafts]
    assert [s.expression for s in samples] == ["thing 0", "a", "b", "thing 2", "thing 3", "thing 4"]
    assert [s.meta for s in samples[:2]] == [{"n": 0, "source_frame": "pixels"}, {"n": 1, "source_frame": "pixels"}]
    assert samples[0].boxes_xyxy_px == ((1.0, 2.0, 11.5, 22.0),) and len({s.key for s in samples}) == 6
    assert samples[1].image.tobytes() == samples[2].image.tobytes() != samples[3].image.tobytes()
    assert drafts[1].image == drafts[2].image and hash(drafts[1].image) == hash(drafts[2].image)
    for sample in samples:
        check_sample(sample)


def test_columns_take_other_names_and_a_list_of_one_picture_is_one(write, tmp_path):
    path = write([row(0, images=["0.png"], source="web"), row(1, images=["0.png", "1.png"], source="ios")])
    first, second = parquet.read(path, **ASKED, image_column="images", meta_columns=["platform=source", "n"],
                                 image_root=str(tmp_path))
    assert first.load().meta == {"platform": "web", "n": 0, "source_frame": "pixels"}
    with pytest.raises(SampleError, match="the column 'images' holds 2 pictures, expected one"):
        second.load()


def test_pictures_out_of_order_and_one_group_in_memory(write):
    drafts = list(parquet.read(write([row(number) for number in range(5)]), **ASKED))
    wanted = [draft.read() for draft in drafts]
    assert [drafts[number].read() for number in (4, 0, 3, 1, 2)] == [wanted[number] for number in (4, 0, 3, 1, 2)]
    assert len(set(wanted)) == 5 and parquet._image_column.cache_info().maxsize == 1


def test_paths_instead_of_bytes(write, tmp_path, picture):
    picture("pictures/a.png")
    for name, value in (("x", {"bytes": None, "path": "pictures/a.png"}), ("y", "pictures/a.png")):
        table = pa.Table.from_pylist([{**row(0), "image": value}])
        pq.write_table(table, tmp_path / f"{name}.parquet")
        (draft,) = parquet.read(str(tmp_path / f"{name}.parquet"), **ASKED)
        assert draft.load().image.size == (40, 30)
        (draft,) = parquet.read(str(tmp_path / f"{name}.parquet"), **ASKED, image_root=str(tmp_path / "pictures"))
        with pytest.raises(SampleError, match="missing image.*row group 0 row 0: No such file"):
            draft.load()


@pytest.mark.parametrize("frame, layout, box", [
    ("relative_1", "xyxy", [0.1, 0.2, 0.5, 1.0]), ("relative_1000", "xyxy", [100, 200, 500, 1000]),
    ("relative_1", "xywh", [0.1, 0.2, 0.4, 0.8]), ("pixels", "xyxy", [4, 6, 20, 30])])
def test_frames_and_layouts(write, frame, layout, box):
    (draft,) = parquet.read(write([row(0, bbox=box)]), frame, layout, "answer")
    assert draft.load().boxes_xyxy_px == (pytest.approx((4, 6, 20, 30)),)


def test_a_wrong_frame_says_which_would_fit(write):
    (draft,) = parquet.read(write([row(0, bbox=[0.1, 0.2, 0.5, 1.0])]), "pixels", "xyxy", "answer")
    with pytest.raises(SampleError, match="it fits the frame 'relative_1'"):
        draft.load()


@pytest.mark.parametrize("objects", [
    {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1, 0]},
    [{"bbox": [1, 2, 3, 4], "category": 1}, {"bbox": [5, 6, 7, 8], "category": 0}]])
def test_detection_in_columns_of_columns(write, objects):
    path = write([{"image": "a.png", "objects": objects}])
    options = {"bbox_column": "objects.bbox", "label_column": "objects.category", "task": "detection"}
    (draft,) = parquet.read(path, "pixels", "xywh", class_names=["cat", "dog"], **options)
    sample = draft.load()
    assert sample.labels == ("dog", "cat") and sample.expression == "cat, dog" and sample.task == "detection"
    assert sample.boxes_xyxy_px == ((1.0, 2.0, 4.0, 6.0), (5.0, 6.0, 12.0, 14.0))
    (draft,) = parquet.read(path, "pixels", "xywh", class_names=["cat"], **options)
    with pytest.raises(SampleError, match="class number 1 has no name"):
        draft.load()


def test_splits_by_name(write, tmp_path):
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/val-0.parquet",
                 "data/test/0000.parquet"):
        write([row(0)], name)
    root = str(tmp_path / "data")
    found = {split: [d.load() for d in parquet.read(root, **ASKED, split=split)] for split in ("train", "val", "test")}
    assert {split: len(samples) for split, samples in found.items()} == {"train": 2, "val": 1, "test": 1}
    assert len({s.key for s in found["train"]}) == 2 and found["val"][0].meta["split"] == "val"
    assert len(list(parquet.read(root + "/train-*.parquet", **ASKED))) == 2
    with pytest.raises(ValueError, match="no file of split 'dev'.*only 0000.parquet, train-00000"):
        next(parquet.read(root, **ASKED, split="dev"))


@pytest.mark.parametrize("change, words", [
    ({"bbox": None}, "at least one box"), ({"bbox": [1.0, 2.0, 50.0, 4.0]}, "box outside image"),
    ({"bbox": [1.0, 2.0, 0.0, 4.0]}, "empty box"), ({"bbox": [1.0, 2.0]}, "four finite numbers"),
    ({"answer": [None]}, "expression must be a text"), ({"answer": []}, "no text in 'answer'"),
    ({"image": {"bytes": b"no picture", "path": "x"}}, "broken image"),
    ({"image": {"bytes": None, "path": None}}, "neither bytes nor a path"),
])
def test_a_bad_row_is_named_and_spoils_no_other(write, change, words):
    drafts = list(parquet.read(write([row(0), row(1, **change), row(2)]), **ASKED))
    assert len(drafts) == 3 and [drafts[n].load().expression for n in (0, 2)] == ["thing 0", "thing 2"]
    with pytest.raises(SampleError) as caught:
        drafts[1].load()
    assert words in str(caught.value) and "parquet row group 0 row 1" in str(caught.value)


@pytest.mark.parametrize("options, words", [
    ({"annotations": "gone"}, "gone: no .parquet file there"),
    ({"bbox_column": "box"}, "no column 'box'; it has image"),
    ({"expression_column": "objects.x"}, "no column 'objects.x'"), ({"bbox_column": "bbox.x"}, "no column 'bbox.x'"),
    ({"frame": "px"}, "unknown frame"), ({"bbox_format": "yxyx"}, "bbox_format='yxyx' is none of xyxy, xywh"),
    ({"task": "detection"}, "a detection needs one"), ({"label_column": "n"}, "other tasks have none"),
    ({"expression_column": None}, "name expression_column"), ({"meta_columns": ["id"]}, "the record's own"),
    ({"image_root": "gone"}, "image_root='gone'"),
])
def test_what_is_told_at_once(write, options, words):
    with pytest.raises(ValueError, match=words):
        next(parquet.read(**{"annotations": write([row(0)]), **ASKED, **options}))


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="cannot read .*a.parquet. as parquet"):
        next(parquet.read(str(tmp_path), **ASKED))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match="Dataset.to_parquet"):
        next(parquet.read(str(tmp_path / "saved"), **ASKED))


def test_without_pyarrow_the_remedy_is_named(write):
    path = write([row(0)])
    code = ("import sys\nsys.modules['pyarrow'] = None\nfrom megavg.data.readers import parquet\n"
            f"try:\n    next(parquet.read({path!r}, 'pixels', 'xywh', 'answer'))\nexcept ValueError as error:\n"
            "    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "needs pyarrow, which is not installed: pip install pyarrow" in done.stdout, done.stderr


def test_importing_the_readers_does_not_import_pyarrow():
    code = "import sys, megavg.data.readers.parquet\nassert 'pyarrow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


SIDE_BY_SIDE = {"bbox": [[1.0, 2.0, 10.0, 10.0], [5.0, 4.0, 8.0, 7.0]], "caption": ["left cat", "right dog"]}


@pytest.mark.parametrize("task", ["rec", "point"])
def test_texts_and_boxes_side_by_side_are_pairs(write, task):
    options = {"bbox_column": "objects.bbox", "expression_column": "objects.caption", "task": task}
    path = write([{"image": "a.png", "objects": SIDE_BY_SIDE}])
    samples = [draft.load() for draft in parquet.read(path, "pixels", "xyxy", **options)]
    assert [(s.expression, s.boxes_xyxy_px) for s in samples] == [
        ("left cat", ((1.0, 2.0, 10.0, 10.0),)), ("right dog", ((5.0, 4.0, 8.0, 7.0),))]
    for changes, wanted in (({"caption": ["both"]}, [("both", 2)]), ({"bbox": SIDE_BY_SIDE["bbox"][:1]},
                                                                     [("left cat", 1), ("right dog", 1)])):
        path = write([{"image": "a.png", "objects": {**SIDE_BY_SIDE, **changes}}])
        samples = [draft.load() for draft in parquet.read(path, "pixels", "xyxy", **options)]
        assert [(s.expression, len(s.boxes_xyxy_px)) for s in samples] == wanted
    path = write([{"image": "a.png", "objects": {**SIDE_BY_SIDE, "caption": ["a", "b", "c"]}}])
    (draft,) = parquet.read(path, "pixels", "xyxy", **options)
    with pytest.raises(SampleError, match="bad labels: 3 texts and 2 boxes"):
        draft.load()


def test_a_path_in_a_row_does_not_leave_its_folder(write, tmp_path, picture):
    picture("secret.png")
    pq.write_table(pa.Table.from_pylist([{**row(0), "image": "../secret.png"}]),
                   Path(write([row(0)])).with_name("x.parquet"))
    (draft,) = parquet.read(str(tmp_path / "data" / "x.parquet"), **ASKED)
    with pytest.raises(SampleError, match="missing image: .*outside the folder of the pictures"):
        draft.load()
    (draft,) = parquet.read(str(tmp_path / "data" / "x.parquet"), **ASKED, allow_outside=True)
    assert draft.load().image.size == (40, 30)
