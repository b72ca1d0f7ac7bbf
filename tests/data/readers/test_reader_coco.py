"""COCO instances files, written here from the format's definition."""

from __future__ import annotations

import json

import pytest

from megavg.data.readers.coco import read
from megavg.data.sample import SampleError, check_sample


@pytest.fixture
def coco(tmp_path, picture):
    """Factory of an instances file of two pictures; ``changes`` replace whole lists."""
    def write(**changes) -> dict:
        picture("val/one.jpg")
        picture("val/two.png", 50, 20)
        content = {
            "info": {"year": 2024}, "licenses": [],
            "images": [{"id": 7, "file_name": "one.jpg", "width": 40, "height": 30, "license": 1},
                       {"id": 9, "file_name": "two.png", "width": 50, "height": 20}],
            "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"},
                           {"id": 3, "name": "car"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1.5, 2, 10, 20.25], "iscrowd": 0, "area": 200,
                 "segmentation": [[1.5, 2, 11.5, 2, 11.5, 22.25]]},
                {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 0, 20.004, 30], "iscrowd": 0},
                {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1,
                 "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
                {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5]},
                {"id": 5, "image_id": 7, "category_id": 3, "bbox": [9, 9, 5, 5]}],
            **changes}
        path = tmp_path / "instances_val.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return {"annotations": str(path), "image_root": str(tmp_path / "val")}
    return write


def test_detection_takes_every_box_but_crowds(coco):
    (draft,) = read(**coco())
    sample = draft.load()
    check_sample(sample)
    assert sample.task == "detection" and sample.expression == "dog, person, car"
    assert sample.labels == ("dog", "person", "car", "car")
    assert sample.boxes_xyxy_px == ((1.5, 2.0, 11.5, 22.25), (20.0, 0.0, 40.0, 30.0), (0.0, 0.0, 5.0, 5.0),
                                    (9.0, 9.0, 14.0, 14.0))
    assert sample.meta["objects"] == [{"ann_id": number} for number in (1, 2, 4, 5)]
    assert sample.meta["image_id"] == 7 and (sample.width, sample.height) == (40, 30)


def test_classes_crowds_and_empty_pictures_by_option(coco):
    found = [draft.load() for draft in read(**coco(), classes=["person", "dog"], keep_crowd=True, keep_empty=True)]
    assert [s.labels for s in found] == [("dog", "person", "person"), ()]
    assert {s.expression for s in found} == {"person, dog"} and found[1].boxes_xyxy_px == ()
    # nothing but a crowd is no picture without persons
    crowd = [{"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1}]
    found = list(read(**coco(annotations=crowd), classes=["person"], keep_empty=True))
    assert [draft.fields["image_id"] for draft in found] == [9]


def test_rec_asks_only_for_what_occurs_once(coco):
    samples = [draft.load() for draft in read(**coco(), task="rec")]
    # two cars; one person beside a crowd of them
    (sample,) = samples
    assert (sample.expression, sample.meta["label"], sample.meta["ann_id"]) == ("the dog", "dog", 1)
    assert sample.task == "rec"
    assert samples[0].boxes_xyxy_px == ((1.5, 2.0, 11.5, 22.25),) and samples[0].labels == ()
    assert [draft.load().task for draft in read(**coco(), task="point")] == ["point"]


def test_classification_takes_pictures_of_one_class(coco):
    (draft,) = read(**coco(), task="classification", classes=["dog"])
    sample = draft.load()
    assert sample.labels == ("dog",) and sample.boxes_xyxy_px == () and sample.task == "classification"
    assert list(read(**coco(), task="classification")) == []


def test_the_size_is_read_from_the_picture_where_the_file_does_not_state_it(coco):
    images = [{"id": 7, "file_name": "one.jpg"}, {"id": 9, "file_name": "two.png"}]
    (draft,) = read(**coco(images=images))
    assert (draft.load().width, draft.load().height) == (40, 30)


@pytest.mark.parametrize("annotation, reason, words", [
    ({"image_id": 7, "category_id": 18}, "missing field", "'bbox'"),
    ({"image_id": 7, "category_id": 99, "bbox": [1, 1, 2, 2]}, "missing field", "category_id 99"),
    ({"image_id": 8, "category_id": 18, "bbox": [1, 1, 2, 2]}, "missing field", "image_id 8"),
    ("oops", "bad json", "expected an object"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, 0, 5]}, "empty box", "x1 > x0"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, -4, 5]}, "empty box", "x1 > x0"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, 50, 5]}, "box outside image", "40 x 30"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, "4", 5]}, "bad json", "four finite numbers"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, 5]}, "bad json", "four finite numbers"),
    ({"image_id": 7, "category_id": 18, "bbox": [1, 1, float("nan"), 5]}, "bad json", "four finite numbers"),
])
def test_a_bad_annotation_spoils_its_picture_alone(coco, annotation, reason, words):
    good = {"id": 1, "image_id": 9, "category_id": 18, "bbox": [1, 2, 3, 4]}
    drafts = list(read(**coco(annotations=[annotation, good])))
    assert len(drafts) == 2 and drafts[1].load().boxes_xyxy_px == ((1.0, 2.0, 4.0, 6.0),)
    with pytest.raises(SampleError) as caught:
        drafts[0].load()
    assert caught.value.reason == reason and words in str(caught.value) and "instances_val.json" in str(caught.value)


@pytest.mark.parametrize("changes, options, words", [
    ({"categories": None}, {}, "'categories' is missing"), ({}, {"classes": ["cat"]}, "no class 'cat'; it has dog"),
    ({}, {"image_root": "gone"}, "image_root='gone' does not exist"),
    ({}, {"task": "rex"}, "task='rex' is none of rec"),
    ({}, {"annotations": "gone.json"}, "cannot read annotations 'gone.json'"),
    ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, {}, "image id 1 occurs twice"),
    ({"images": [{"id": 1}]}, {}, "expected images with an id and a file_name"),
    ({"categories": [{"name": "x"}]}, {}, "expected categories with an id and a name"),
    ({"categories": []}, {}, "holds no classes"),
])
def test_a_file_that_is_none_is_told_at_once(coco, changes, options, words):
    with pytest.raises(ValueError, match=words):
        next(read(**{**coco(**changes), **options}))


def test_no_json(coco, tmp_path):
    arguments = coco()
    (tmp_path / "instances_val.json").write_text("{" * 100_000)
    with pytest.raises(ValueError, match="cannot read annotations .*instances_val.json"):
        next(read(**arguments))


def test_missing_and_different_pictures(coco, picture):
    arguments = coco()
    picture("val/one.jpg", 41, 30)
    with pytest.raises(SampleError, match="size mismatch"):
        next(read(**arguments)).load()
    images = [{"id": 7, "file_name": "gone.jpg", "width": 40, "height": 30}]
    with pytest.raises(SampleError, match="missing image: .*gone.jpg"):
        next(read(**coco(images=images, annotations=[{"id": 1, "image_id": 7, "category_id": 18,
                                                      "bbox": [1, 2, 3, 4]}]))).load()
