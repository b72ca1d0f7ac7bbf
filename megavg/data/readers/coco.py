"""Read COCO instances JSON: detection, or the objects whose class occurs once in the picture.

The format (cocodataset.org, "Data format"): ``images`` with id, file_name, width, height; ``categories`` with id and
name; ``annotations`` with id, image_id, category_id, iscrowd and bbox = x, y, width, height in pixels, counted from 0
and continuous, so that x + width is the exclusive right edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

from megavg.data.readers.base import Draft, PictureFolder, broken, key_from, key_word
from megavg.data.readers.files import existing_folder, read_json
from megavg.data.readers.frames import from_xywh
from megavg.data.readers.objects import Picture, Thing, check_task, chosen_classes, picture_drafts

CLIP_PX = 0.5


@dataclass(frozen=True)
class Instances:
    """A COCO instances file: its pictures and category names by id, in the file's order, and its annotations."""

    path: str
    images: dict[Any, dict[str, Any]]
    categories: dict[Any, str]
    annotations: list[Any]


def load_instances(path: str) -> Instances:
    """Read an instances file; the masks are dropped while it is read, they are most of its size.

    Raises:
        ValueError: the file is missing, is no COCO instances JSON, or an image id occurs twice.
    """
    content = read_json(path, _without_mask)
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: expected a COCO instances JSON with the lists images, annotations and "
                             f"categories, but {name!r} is missing")
    images: dict[Any, dict[str, Any]] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _is_id(image.get("id")):
            raise ValueError(f"{path}: expected images with an id and a file_name, got {_short(image)}")
        if image["id"] in images:
            raise ValueError(f"{path}: image id {image['id']!r} occurs twice")
        images[image["id"]] = image
    categories: dict[Any, str] = {}
    for category in content["categories"]:
        if not isinstance(category, dict) or not isinstance(category.get("name"), str) or not _is_id(
                category.get("id")):
            raise ValueError(f"{path}: expected categories with an id and a name, got {_short(category)}")
        categories[category["id"]] = category["name"]
    return Instances(path, images, categories, content["annotations"])


def read(annotations: str, image_root: str, task: str = "detection", classes: list[str] | None = None,
         keep_empty: bool = False, keep_crowd: bool = False, clip: float = CLIP_PX,
         allow_outside: bool = False) -> Iterator[Draft]:
    """Yield the samples of a COCO instances file.

    Args:
        annotations: the JSON file, such as instances_val2017.json.
        image_root: the folder that the file names are relative to, such as val2017.
        task: "detection", "rec", "point" or "classification", see ``megavg.data.readers.objects``.
        classes: names of the classes asked for; None: all categories of the file.
        keep_empty: with task=detection, keep pictures without any of the classes; the right answer is "None".
        keep_crowd: take iscrowd annotations as ordinary boxes. Left out by default; a crowd still counts where a
            class must occur once.
        clip: boxes that leave the picture by at most so many pixels are cut at its edge (annotations are rounded).
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: a file or folder is missing, the file is no COCO instances JSON, an unknown class or task.
    """
    check_task(task)
    existing_folder(image_root, "image_root", "the pictures of " + annotations)
    data = load_instances(annotations)
    asked = chosen_classes(classes, tuple(dict.fromkeys(data.categories.values())), annotations)
    things: dict[Any, list[Thing]] = {number: [] for number in data.images}
    faults: dict[Any, tuple[str, str]] = {}
    for place, annotation in enumerate(data.annotations):
        fault = _fault(annotation, data)
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if fault is None:
            things[image_id].append(Thing(from_xywh(annotation["bbox"]), data.categories[annotation["category_id"]],
                                          bool(annotation.get("iscrowd")) and not keep_crowd,
                                          {"ann_id": annotation.get("id")}))
        elif _is_id(image_id) and image_id in data.images:
            # The answer to a picture that lacks an object would be wrong.
            faults.setdefault(image_id, (fault[0], f"annotation {place}: {fault[1]}"))
        else:
            yield broken(f"{annotations}: annotation {place}", key_from("annotation", place), *fault)
    for number, image in data.images.items():
        where = f"{annotations}: image {number}"
        # The id alone makes the key unique; a text may hold folders, which key_from would leave out.
        key_parts = (key_word(image["file_name"]), number.replace("/", "|") if isinstance(number, str) else number)
        if number in faults:
            yield broken(where, key_from(*key_parts), *faults[number])
            continue
        picture = Picture(where, key_parts, PictureFolder(image_root, allow_outside).file(image["file_name"]),
                          things[number], {"image": image["file_name"], "image_id": number, **size_fields(image)})
        yield from picture_drafts(picture, task, asked, keep_empty, clip)


def size_fields(image: dict[str, Any]) -> dict[str, Any]:
    """Width and height as the file states them, in pixels; nothing where it does not (they are read from the file)."""
    return {name: image[name] for name in ("width", "height") if image.get(name) is not None}


def _fault(annotation: Any, data: Instances) -> tuple[str, str] | None:
    """Why an annotation cannot be used: (reason, detail), or None."""
    if not isinstance(annotation, dict):
        return "bad json", f"expected an object, got {_short(annotation)}"
    for name in ("image_id", "category_id", "bbox"):
        if name not in annotation:
            return "missing field", f"{name!r} is not among {sorted(annotation)}"
    for name, known in (("image_id", data.images), ("category_id", data.categories)):
        if not _is_id(annotation[name]) or annotation[name] not in known:
            return "missing field", f"annotation {annotation.get('id')!r} has {name} {annotation[name]!r}, which the " \
                                    "file does not list"
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _without_mask(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("segmentation", None)
    return fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
