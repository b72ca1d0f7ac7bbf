"""Every format of the data sets people have, from its own files to shards by the command line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from megavg.data.shards import iterate_all
from megavg.evaluation.rows import answer_row
from megavg.evaluation.tables import refcoco_columns
from megavg.protocols.sample import Completion, Frame
from tests.data.readers.test_reader_conversations import rec, talk
from tests.data.readers.test_reader_screenspot import PRO, ROW
from tests.data.readers.test_reader_voc import CAR, DOG, xml
from tools.make_shards import main
from tools.shard_formats import load_formats


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_voc(folder: Path) -> list[str]:
    picture(folder / "VOC/JPEGImages/a.jpg")
    (folder / "VOC/Annotations").mkdir()
    (folder / "VOC/Annotations/a.xml").write_text(xml("a.jpg", [DOG, CAR]))
    return ["--annotations", f"{folder}/VOC"]


def make_screenspot(folder: Path) -> list[str]:
    picture(folder / "screenspot_imgs/web_1.png")
    write(folder / "screenspot_web.json", [ROW])
    return ["--annotations", str(folder)]


def make_screenspot_pro(folder: Path) -> list[str]:
    picture(folder / "images/word_windows/shot.png")
    write(folder / "annotations/word_windows.json", [PRO])
    return ["--annotations", f"{folder}/annotations", "--version", "pro"]


def make_refcoco(folder: Path) -> list[str]:
    picture(folder / "train2014/COCO_train2014_000000000007.jpg")
    sentence = {"tokens": ["left", "dog"], "raw": "left dog", "sent": "left dog", "sent_id": 5}
    refs = [{"ref_id": 1, "ann_id": 9, "image_id": 7, "split": "testA", "category_id": 18, "sent_ids": [5],
             "file_name": "COCO_train2014_000000000007_9.jpg", "sentences": [sentence]}]
    (folder / "refcoco").mkdir()
    (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    write(folder / "refcoco/instances.json", {
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 9, "image_id": 7, "category_id": 18, "bbox": [4, 5, 20, 10], "iscrowd": 0}],
        "categories": [{"id": 18, "name": "dog"}]})
    return ["--annotations", f"{folder}/refcoco/refs(unc).p", "--image-root", f"{folder}/train2014", "--split", "testA"]


def make_vlm_r1(folder: Path) -> list[str]:
    picture(folder / "train2014/a.jpg", (427, 640))
    write(folder / "rec.json", [rec()])
    return ["--annotations", f"{folder}/rec.json", "--frame", "pixels"]


def make_llava(folder: Path) -> list[str]:
    picture(folder / "train2014/a.jpg")
    question = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: a dog."
    write(folder / "llava.json", [talk((question, "[0.10, 0.20, 0.60, 0.50]"))])
    return ["--annotations", f"{folder}/llava.json", "--frame", "relative_1"]


def make_parquet(folder: Path) -> list[str]:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    picture(folder / "a.png")
    rows = [{"image": {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}, "answer": "a dog",
             "bbox": [4.0, 5.0, 20.0, 10.0]}]
    (folder / "hf").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "hf/val-00000-of-00001.parquet")
    return ["--annotations", f"{folder}/hf", "--split", "val", "--frame", "pixels", "--bbox-format", "xywh",
            "--expression-column", "answer"]


DOG_BOX = (4.0, 5.0, 24.0, 15.0)
# name -> (format, how its files are made, task, boxes in original pixels)
SETS = {
    "voc": ("voc", make_voc, "detection", ((0, 0, 40, 30), (2, 3, 10, 11))),
    "screenspot": ("screenspot", make_screenspot, "point", (DOG_BOX,)),
    "screenspot pro": ("screenspot", make_screenspot_pro, "point", (DOG_BOX,)),
    "refcoco": ("refcoco", make_refcoco, "rec", (DOG_BOX,)),
    "vlm_r1": ("vlm_r1", make_vlm_r1, "rec", ((103.93, 299.99, 238.15, 477.41),)),
    "llava": ("llava", make_llava, "rec", ((4, 6, 24, 15),)),
    "parquet": ("parquet", make_parquet, "rec", (DOG_BOX,)),
}


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_becomes_shards(name, tmp_path):
    form, make, task, boxes = SETS[name]
    assert main(["--format", form, *make(tmp_path / "source"), "--out", str(tmp_path / "shards")]) == 0
    (sample,) = iterate_all(str(tmp_path / "shards"))
    assert sample.task == task and sample.image.size == (sample.width, sample.height)
    assert [box for box in sample.boxes_xyxy_px] == [pytest.approx(box, abs=1e-9) for box in boxes]


def test_fields_that_the_source_does_not_say(tmp_path, capsys):
    """VLM-R1's files do not say of which split they are, and the official table goes by that."""
    picture(tmp_path / "coco/train2014/a.jpg", (427, 640))
    write(tmp_path / "rec.json", [rec()])
    asked = ["--format", "vlm_r1", "--annotations", f"{tmp_path}/rec.json", "--image-root", f"{tmp_path}/coco",
             "--frame", "pixels", "--out", f"{tmp_path}/out"]
    assert main([*asked, "--meta", "split=testA,dataset=refcoco+"]) == 0
    (sample,) = iterate_all([str(tmp_path / "out")])
    assert (sample.meta["split"], sample.meta["dataset"], sample.meta["row_id"]) == ("testA", "refcoco+", 0)
    frame = Frame("relative_1000", 427, 640, 427, 640)
    row = answer_row(sample, Completion("none", "json_relative_1000", frame, 1, False))
    assert list(refcoco_columns({"x": [row]})) == [("refcoco+", "testA")]
    for wrong, words in (("split", "is not name=text"), ("task=point", "'task' is the record's own")):
        with pytest.raises(SystemExit):
            main([*asked, "--meta", wrong])
        assert words in capsys.readouterr().err


def test_every_format_is_tried():
    """Scenes, JSONL and COCO are in test_make_shards.py."""
    assert {form for form, *_ in SETS.values()} | {"scenes", "jsonl", "coco"} == set(load_formats())
