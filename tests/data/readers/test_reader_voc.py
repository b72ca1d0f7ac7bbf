"""Pascal VOC folders, written here from the development kit's definition, and cards through three formats."""

from __future__ import annotations

import json

import pytest

from megavg.data.readers import coco, jsonl, voc
from megavg.data.sample import SampleError, check_sample


def xml(filename: str, objects: list[dict], width: int = 40, height: int = 30) -> str:
    """One annotation file; an object has name, box (xmin, ymin, xmax, ymax) and perhaps difficult, truncated."""
    parts = []
    for thing in objects:
        corners = "".join(f"<{corner}>{value}</{corner}>" for corner, value in
                          zip(("xmin", "ymin", "xmax", "ymax"), thing["box"], strict=True))
        parts.append(f"<object><name>{thing['name']}</name><pose>Unspecified</pose>"
                     f"<truncated>{thing.get('truncated', 0)}</truncated><difficult>{thing.get('difficult', 0)}"
                     f"</difficult><bndbox>{corners}</bndbox>"
                     "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
                     "</part></object>")
    return (f"<annotation><folder>VOC</folder><filename>{filename}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size><segmented>0</segmented>{''.join(parts)}</annotation>")


DOG, CAR = {"name": "dog", "box": (1, 1, 40, 30)}, {"name": "car", "box": (3, 4, 10, 11), "difficult": 1}


@pytest.fixture
def folder(tmp_path, picture):
    """Factory of a VOC folder from texts or lists of objects by picture name."""
    def write(pictures: dict, splits: dict | None = None) -> str:
        for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / "VOC" / place).mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            picture(f"VOC/JPEGImages/{name}.jpg")
            text = content if isinstance(content, (str, bytes)) else xml(name + ".jpg", content)
            data = text if isinstance(text, bytes) else text.encode()
            (tmp_path / "VOC" / "Annotations" / f"{name}.xml").write_bytes(data)
        for name, lines in (splits or {}).items():
            (tmp_path / "VOC" / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "VOC")
    return write


def test_corners_become_edges_counted_from_0(folder):
    (draft,) = voc.read(folder({"2008_000001": [DOG, CAR]}))
    sample = draft.load()
    check_sample(sample)
    assert sample.boxes_xyxy_px == ((0.0, 0.0, 40.0, 30.0), (2.0, 3.0, 10.0, 11.0)) and sample.labels == ("dog", "car")
    assert sample.expression == "car, dog" and sample.task == "detection"
    assert sample.meta["objects"] == [{"difficult": False, "truncated": False}, {"difficult": True, "truncated": False}]


def test_zero_based_corners_and_floats_are_taken_as_they_are(folder):
    root = folder({"a": [{"name": "dog", "box": (0, 0.5, 40, 30)}]})
    assert next(voc.read(root, zero_based=True)).load().boxes_xyxy_px == ((0.0, 0.5, 40.0, 30.0),)
    with pytest.raises(SampleError, match="before the first pixel.*zero_based"):
        list(voc.read(root, classes=["dog"], split=None))[0].load()


def test_difficult_and_truncated_by_option(folder):
    root = folder({"a": [DOG, CAR, {"name": "car", "box": (5, 5, 9, 9)}, {**DOG, "name": "cow", "truncated": 1}]})
    labels = [draft.load().labels for draft in voc.read(root, skip_difficult=True, skip_truncated=True)]
    assert labels == [("dog", "car")]
    # the car that is left out still makes "the car" ambiguous
    rec = [draft.load() for draft in voc.read(root, task="rec", skip_difficult=True)]
    assert [s.expression for s in rec] == ["the dog", "the cow"] and rec[1].meta["truncated"] is True


def test_splits_ask_the_same_question(folder):
    root = folder({"a": [DOG], "b": [CAR], "c": []}, {"train": ["a", "c"], "val": ["b"], "dog_train": ["a  1", "c -1"]})
    train = [draft.load() for draft in voc.read(root, "train", keep_empty=True)]
    assert [(s.meta["image"], s.labels) for s in train] == [("a.jpg", ("dog",)), ("c.jpg", ())]
    (val,) = voc.read(root, "val")
    assert val.load().expression == train[0].expression == "car, dog" and val.load().meta["split"] == "val"
    assert [d.load().labels for d in voc.read(root, "val", classes=["car"])] == [("car",)]
    with pytest.raises(ValueError, match="no split 'test'.*it has dog_train, train, val"):
        next(voc.read(root, "test"))
    with pytest.raises(ValueError, match="the list of one class"):
        next(voc.read(root, "dog_train"))


def test_no_suffix_and_no_size(folder):
    root = folder({"a": xml("a", [DOG], 0, 0)})
    sample = next(voc.read(root)).load()
    assert sample.meta["image"] == "a.jpg" and (sample.width, sample.height) == (40, 30)


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation>&b;</annotation>'


@pytest.mark.parametrize("content, words", [
    (BOMB, "DOCTYPE"), (BOMB.encode("utf-16"), "DOCTYPE"),
    ('<!DOCTYPE x SYSTEM "file:///etc/hostname"><annotation/>', "DOCTYPE"),
    ("<annotation>", "no VOC annotation"), ("", "no VOC annotation"), ("<html/>", "expected <annotation>"),
    ("<annotation><object><name>x</name></object></annotation>", "needs a <name> and a <bndbox>"),
    (xml("b.jpg", [{"name": " ", "box": (1, 1, 2, 2)}]), "needs a <name>"),
    (xml("b.jpg", [{"name": "dog", "box": (1, "x", 2, 2)}]), "ymin is no number but 'x'"),
    (xml("b.jpg", [{"name": "dog", "box": (1, 1, 42, 2)}]), "box outside image"),
    (xml("b.jpg", [{"name": "dog", "box": (5, 5, 4, 4)}]), "empty box"),
    (xml("b.jpg", [{"name": "dog", "box": ("nan", 5, 4, 4)}]), "four finite numbers"),
    (xml("gone.jpg", [DOG]), "missing image"), (xml("b.jpg", [DOG], 41), "size mismatch"),
])
def test_a_bad_file_is_named_and_spoils_no_other(folder, content, words):
    drafts = list(voc.read(folder({"a": [DOG], "b": content})))
    assert drafts[0].load().labels == ("dog",) and len(drafts) == 2
    with pytest.raises(SampleError) as caught:
        drafts[1].load()
    assert words in str(caught.value) and "b.xml" in str(caught.value)


def test_a_name_in_a_split_without_a_file(folder):
    drafts = list(voc.read(folder({"a": [DOG]}, {"train": ["a", "gone"]}), "train"))
    with pytest.raises(SampleError, match="gone.xml.*No such file"):
        drafts[1].load()


@pytest.mark.parametrize("make, options, words", [
    (lambda path: None, {}, "annotations=.* does not exist"),
    (lambda path: (path / "VOC").mkdir(), {}, "annotations/Annotations"),
    (lambda path: (path / "VOC" / "Annotations").mkdir(parents=True), {}, "found no folder of pictures.*image_root"),
    (lambda path: [(path / "VOC" / name).mkdir(parents=True) for name in ("Annotations", "JPEGImages")], {},
     "holds no .xml file"),
])
def test_missing_folders_are_told_at_once(tmp_path, make, options, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        next(voc.read(str(tmp_path / "VOC"), **options))


def test_the_playing_cards_are_the_same_in_three_formats(cards, tmp_path):
    root, rows = cards
    lines = [json.dumps({**row, "image": row["image"].removeprefix("images/")}) for row in rows]
    (tmp_path / "cards.jsonl").write_text("\n".join(lines), encoding="utf-8")
    names = sorted({thing["label"] for row in rows for thing in row["objects"]})
    images, annotations = [], []
    (tmp_path / "VOC" / "Annotations").mkdir(parents=True)
    for number, row in enumerate(rows):
        file_name = row["image"].removeprefix("images/")
        images.append({"id": number, "file_name": file_name, "width": row["width"], "height": row["height"]})
        boxes = [thing["bbox"] for thing in row["objects"]]
        annotations += [{"id": len(annotations) + place, "image_id": number, "iscrowd": 0,
                         "category_id": names.index(thing["label"]), "bbox": [x0, y0, x1 - x0, y1 - y0]}
                        for place, (thing, (x0, y0, x1, y1)) in enumerate(zip(row["objects"], boxes, strict=True))]
        things = [{"name": thing["label"], "box": (x0 + 1, y0 + 1, x1, y1)}
                  for thing, (x0, y0, x1, y1) in zip(row["objects"], boxes, strict=True)]
        (tmp_path / "VOC" / "Annotations" / file_name).with_suffix(".xml").write_text(
            xml(file_name, things, row["width"], row["height"]))
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": images, "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)]}))
    pictures = str(root / "images")

    def content(drafts):
        samples = [draft.load() for draft in drafts]
        return {(s.meta["image"], s.expression): (s.boxes_xyxy_px, s.labels, s.image.tobytes()) for s in samples}

    for task, wanted in (("detection", 40), ("rec", None)):
        plain = content(jsonl.read(str(tmp_path / "cards.jsonl"), task=task, expression="label", image_root=pictures))
        assert len(plain) == wanted or task == "rec" and len(plain) > 40
        assert plain == content(coco.read(str(tmp_path / "coco.json"), pictures, task=task))
        assert plain == content(voc.read(str(tmp_path / "VOC"), task=task, image_root=pictures))
