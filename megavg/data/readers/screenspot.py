"""Read ScreenSpot (v1), ScreenSpot-v2 and ScreenSpot-Pro: one GUI element to point at per row.

======= ======================================== ============================ =====================================
version files                                    bbox, in pixels              other fields
======= ======================================== ============================ =====================================
v1      screenspot_{mobile,desktop,web}.json     x, y, width, height          img_filename, instruction,
                                                                              data_type (text, icon), data_source
v2      screenspot_{mobile,desktop,web}_v2.json  as v1                        as v1
pro     annotations/*.json, one per application  x0, y0, x1, y1               img_filename, instruction,
                                                                              instruction_cn, id, application,
                                                                              platform, group, ui_type, img_size
======= ======================================== ============================ =====================================

Each file is a JSON list. Sources: njucckevin/SeeClick, pretrain/screenspot_test.py (v1);
likaixin2000/ScreenSpot-Pro-GUI-Grounding, eval_screenspot_pro.py (pro); the data set OS-Copilot/ScreenSpot-v2 keeps
the rows of v1, corrected. Converted copies (parquet with boxes of 0..1) are read by ``parquet``.
"""

from __future__ import annotations

import os
import re
from typing import Any, Iterator

from megavg.data.readers.base import Draft, PictureFolder, broken, key_from
from megavg.data.readers.coco import CLIP_PX
from megavg.data.readers.files import check_choice, first_folder, read_json
from megavg.data.readers.frames import from_xywh

VERSIONS = ("auto", "v1", "v2", "pro")
_NAME = re.compile(r"screenspot_(mobile|desktop|web)(_v2)?\.json")
_ROW_FIELDS = {"v1": ("img_filename", "bbox", "instruction", "data_type", "data_source"),
               "pro": ("img_filename", "bbox", "instruction", "ui_type", "platform", "application", "group",
                       "img_size")}
_ROW_FIELDS["v2"] = _ROW_FIELDS["v1"]
_IMAGES = {"v1": ("screenspot_imgs", "images"), "v2": ("screenspotv2_image", "images"), "pro": ("../images", "images")}


def read(annotations: str, image_root: str | None = None, version: str = "auto", language: str = "en",
         clip: float = CLIP_PX, allow_outside: bool = False) -> Iterator[Draft]:
    """Yield one sample of task "point" per row.

    Meta holds dataset (screenspot, screenspot-v2, screenspot-pro), platform (mobile, desktop, web; of Pro windows,
    macos, linux), data_type (text, icon), image, and data_source (v1, v2) or application, group and source_id (Pro).

    Args:
        annotations: one JSON file, or the folder of them.
        image_root: the folder of the pictures; None: the one beside the files that the version unpacks to.
        version: "v1", "v2" or "pro"; "auto" takes the version that names and fields prove, or stops.
        language: of the instruction, "en" or (Pro) "cn".
        clip: boxes that leave the picture by at most so many pixels are cut at its edge.
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: a file or folder is missing, no list of rows, or the version cannot be told.
    """
    check_choice(version, VERSIONS, "version")
    check_choice(language, ("en", "cn"), "language")
    files = [(path, read_json(path)) for path in _paths(annotations, version)]
    for path, rows in files:
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    versions = {path: _version_of(path, rows, version) for path, rows in files}
    if len(set(versions.values())) > 1:
        found = ", ".join(f"{os.path.basename(path)}: {name}" for path, name in versions.items())
        raise ValueError(f"{annotations}: holds several versions of ScreenSpot ({found}); name one file, or the "
                         "version")
    chosen = next(iter(versions.values()))
    if language != "en" and chosen != "pro":
        raise ValueError(f"language={language!r}: ScreenSpot {chosen} has English instructions only")
    folder = os.path.dirname(os.path.abspath(files[0][0]))
    image_root = first_folder([image_root] if image_root else [os.path.join(folder, name) for name in _IMAGES[chosen]],
                              "image_root", "the pictures of ScreenSpot " + chosen)
    for path, rows in files:
        for number, row in enumerate(rows):
            yield _draft(path, number, row, chosen, language, PictureFolder(image_root, allow_outside), clip)


def _paths(annotations: str, version: str) -> list[str]:
    if not os.path.isdir(annotations):
        return [annotations]
    names = sorted(name for name in os.listdir(annotations) if name.endswith(".json"))
    if not names:
        raise ValueError(f"{annotations}: holds no .json file; name the folder of the annotations, or one of them")
    # A folder of v1 or v2 may hold other files; where none has their names it is one of Pro.
    named = [name for name in names if (match := _NAME.fullmatch(name))
             and (version == "auto" or version == ("v2" if match.group(2) else "v1"))]
    return [os.path.join(annotations, name) for name in named or names]


def _version_of(path: str, rows: list[Any], version: str) -> str:
    """The version of one file; with "auto" only where its name and its fields agree."""
    name = _NAME.fullmatch(os.path.basename(path))
    named = ("v2" if name.group(2) else "v1") if name else "pro"
    fields = set(rows[0]) if isinstance(rows[0], dict) else set()
    if version == "auto":
        if fields >= set(_ROW_FIELDS[named]) and not (named != "pro" and "img_size" in fields):
            return named
        raise ValueError(f"{path}: cannot tell the version of ScreenSpot from the name and the fields "
                         f"{sorted(fields)}; say version=v1, v2 or pro")
    if version != "pro" and not name:
        raise ValueError(f"{path}: a file of ScreenSpot {version} is named screenspot_mobile.json, ..._desktop.json or "
                         "..._web.json, with _v2 before .json for v2: the platform stands in the name")
    return version


def _draft(path: str, number: int, row: Any, version: str, language: str, pictures: PictureFolder,
           clip: float) -> Draft:
    where = f"{path}: item {number}"
    key = key_from("screenspot", version, path, number)
    missing = [name for name in _ROW_FIELDS[version] if not isinstance(row, dict) or name not in row]
    if missing or not isinstance(row["img_filename"], str):
        return broken(where, key, "missing field", f"ScreenSpot {version} needs {', '.join(missing) or 'a file name'}")
    kind = row["ui_type" if version == "pro" else "data_type"]
    if kind not in ("text", "icon"):
        return broken(where, key, "bad json", f"the type of an element is text or icon, got {kind!r}")
    instruction = row.get("instruction" if language == "en" else "instruction_cn")
    fields = {"task": "point", "expression": instruction, "image": row["img_filename"], "data_type": kind}
    if version == "pro":
        size = row["img_size"]
        if not isinstance(size, list) or len(size) != 2:
            return broken(where, key, "bad json", f"img_size must be [width, height], got {size!r}")
        fields.update(dataset="screenspot-pro", platform=row["platform"], application=row["application"],
                      group=row["group"], source_id=row.get("id", ""), width=size[0], height=size[1],
                      boxes_xyxy_px=[row["bbox"]])
    else:
        platform = _NAME.fullmatch(os.path.basename(path)).group(1)
        fields.update(dataset="screenspot" + ("-v2" if version == "v2" else ""), platform=platform,
                      data_source=row["data_source"], boxes_xyxy_px=[from_xywh(row["bbox"])])
    return Draft(where, key, pictures.file(row["img_filename"]), fields, clip_px=clip)
