"""Read Pascal VOC folders: detection, or the objects whose class occurs once in the picture.

The format (VOC development kit): ``Annotations/<name>.xml``, one per picture, ``JPEGImages/``, and lists of names in
``ImageSets/Main/<split>.txt``. An object has name, difficult, truncated and bndbox with xmin, ymin, xmax, ymax; the
top left pixel of a picture is (1, 1) and the corners are pixels of the box, so that a whole W x H picture is 1, 1,
W, H. Here that is 0, 0, W, H. Many tools write corners counted from 0 that already lie on the edges: ``zero_based``.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any, Iterator

from megavg.data.readers.base import Draft, PictureFolder, broken, key_from
from megavg.data.readers.coco import CLIP_PX
from megavg.data.readers.files import existing_folder, first_folder
from megavg.data.readers.objects import Picture, Thing, check_task, chosen_classes, picture_drafts

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Options:
    zero_based: bool
    skip_difficult: bool
    skip_truncated: bool


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, which is where entities that grow without bound are declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which no VOC annotation does")


def read(annotations: str, split: str | None = None, task: str = "detection", classes: list[str] | None = None,
         keep_empty: bool = False, skip_difficult: bool = False, skip_truncated: bool = False,
         zero_based: bool = False, image_root: str | None = None, clip: float = CLIP_PX,
         allow_outside: bool = False) -> Iterator[Draft]:
    """Yield the samples of a VOC folder, in the order of the names.

    Args:
        annotations: the folder that holds Annotations/, such as VOCdevkit/VOC2012.
        split: take only the names in ImageSets/Main/<split>.txt; None takes every annotation.
        task: "detection", "rec", "point" or "classification", see ``megavg.data.readers.objects``.
        classes: names of the classes asked for; None: all names in the folder, whatever the split, so that every
            split asks the same question.
        keep_empty: with task=detection, keep pictures without any of the classes; the right answer is "None".
        skip_difficult: leave out objects so marked; they still count where a class must occur once.
        skip_truncated: leave out objects so marked; they still count where a class must occur once.
        zero_based: take the corners as they are, without the shift from VOC's counting.
        image_root: the folder of the pictures; None: JPEGImages beside Annotations.
        clip: boxes that leave the picture by at most so many pixels are cut at its edge.
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: a folder or file is missing, an unknown split, class or task.
    """
    check_task(task)
    existing_folder(annotations, "annotations", "Annotations/ and JPEGImages/")
    folder = existing_folder(os.path.join(annotations, "Annotations"), "annotations/Annotations", "the .xml files")
    image_root = first_folder([image_root] if image_root else [os.path.join(annotations, "JPEGImages")], "image_root",
                              "pictures")
    names = sorted(name[:-4] for name in os.listdir(folder) if name.endswith(".xml"))
    if not names:
        raise ValueError(f"{folder}: holds no .xml file")
    options = _Options(zero_based, skip_difficult, skip_truncated)
    files = {name: _read_xml(folder, name, options) for name in names}
    known = sorted({thing.label for content, _ in files.values() if content for thing in content[1]})
    # Where no file could be read, the faults say more than that there are no classes.
    asked = () if not known and any(fault for _, fault in files.values()) else chosen_classes(classes, known, folder)
    for name in names if split is None else _split_names(annotations, split):
        where = os.path.join(folder, name + ".xml")
        content, fault = files[name] if name in files else _read_xml(folder, name, options)
        if fault:
            yield broken(where, key_from("voc", name), *fault)
            continue
        fields, things = content
        picture = Picture(where, (name,), PictureFolder(image_root, allow_outside).file(fields["image"]), things,
                          {**fields, **({"split": split} if split else {})})
        yield from picture_drafts(picture, task, asked, keep_empty, clip)


def _split_names(root: str, split: str) -> list[str]:
    folder = os.path.join(root, "ImageSets", "Main")
    path = os.path.join(folder, split + ".txt")
    if not os.path.isfile(path):
        there = [name[:-4] for name in sorted(os.listdir(folder)) if name.endswith(".txt")] if os.path.isdir(
            folder) else []
        raise ValueError(f"{root}: has no split {split!r}, there is no {path}; it has {', '.join(there) or 'none'}")
    with open(path, encoding="utf-8") as file:
        rows = [line.split() for line in file if line.strip()]
    if any(len(row) > 1 for row in rows):
        raise ValueError(f"{path}: is the list of one class (name and 1, 0 or -1); name the general one, such as "
                         "train, and the class with classes")
    return [row[0] for row in rows]


def _read_xml(folder: str, name: str, options: _Options) -> tuple[tuple[dict, list[Thing]] | None, Any]:
    """((fields, objects), None) of one annotation file, or (None, (reason, detail)) where it cannot be used."""
    try:
        with open(os.path.join(folder, name + ".xml"), "rb") as file:
            root = ElementTree.parse(file, ElementTree.XMLParser(target=_NoDoctype())).getroot()
        return (_fields(root, name), [_thing(entry, options) for entry in root.iterfind("object")]), None
    except OSError as error:
        return None, ("missing field", f"cannot read it: {error.strerror or error}")
    except (ElementTree.ParseError, ValueError) as error:
        return None, ("bad json", f"no VOC annotation: {error}")


def _fields(root: ElementTree.Element, name: str) -> dict[str, Any]:
    if root.tag != "annotation":
        raise ValueError(f"expected <annotation>, got <{root.tag}>")
    image = (root.findtext("filename") or "").strip() or name
    # VOC2007 to 2012 write the suffix, some tools leave it out.
    fields: dict[str, Any] = {"image": image if os.path.splitext(image)[1] else image + ".jpg"}
    for side in ("width", "height"):
        number = _number(root.findtext(f"size/{side}") or "0", side)
        if not math.isfinite(number):
            raise ValueError(f"{side} is no number of pixels but {number}")
        # Some tools write 0 where they do not know the size.
        if int(number):
            fields[side] = int(number)
    return fields


def _thing(entry: ElementTree.Element, options: _Options) -> Thing:
    label = (entry.findtext("name") or "").strip()
    box = entry.find("bndbox")
    if not label or box is None:
        raise ValueError("an <object> needs a <name> and a <bndbox>")
    x0, y0, x1, y1 = (_number(box.findtext(corner), corner) for corner in _CORNERS)
    if not options.zero_based:
        if min(x0, y0) < 1:
            raise ValueError(f"the corner {x0:g}, {y0:g} of {label!r} lies before the first pixel, which is 1, 1 in "
                             "VOC; if the file counts from 0, use zero_based")
        x0, y0 = x0 - 1, y0 - 1
    flags = {flag: (entry.findtext(flag) or "0").strip() not in ("0", "") for flag in ("difficult", "truncated")}
    left_out = options.skip_difficult and flags["difficult"] or options.skip_truncated and flags["truncated"]
    return Thing((x0, y0, x1, y1), label, left_out, flags)


def _number(text: str | None, name: str) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"{name} is no number but {text!r}") from None
