"""Read RefCOCO, RefCOCO+ and RefCOCOg: one sample per sentence.

The format (the authors' ``refer`` repository, lichengunc/refer, refer.py): a folder per data set with
``refs(unc).p``, ``refs(google).p`` or ``refs(umd).p``, a pickle of a list of dictionaries with ref_id, ann_id,
image_id, category_id, split and sentences (each sent_id, sent, raw, tokens), and ``instances.json``, COCO instances of
the pictures of train2014. A ref's own file_name is not the name of a picture; the instances' is.

========== ============ ================================
data set   split by     splits
========== ============ ================================
refcoco    unc, google  train, val, testA, testB (google: test)
refcoco+   unc          train, val, testA, testB
refcocog   umd, google  train, val, test (google: no test)
========== ============ ================================
"""

from __future__ import annotations

import os
import re
from typing import Any, Iterator

from megavg.data.readers.base import Draft, PictureFolder, broken, key_from
from megavg.data.readers.coco import CLIP_PX, Instances, load_instances, size_fields
from megavg.data.readers.files import existing_folder
from megavg.data.readers.frames import from_xywh
from megavg.data.readers.plain_pickle import load_plain, text_of, with_text_keys

_REF_FIELDS = ("ref_id", "ann_id", "split", "sentences")


def read(annotations: str, image_root: str, split: str | None = None, instances: str | None = None,
         dataset: str | None = None, clip: float = CLIP_PX,
         allow_outside: bool = False) -> Iterator[Draft]:
    """Yield one sample per sentence of a refs file.

    Meta holds dataset, split_by, split, ref_id, sent_id, ann_id, category, image_id and image.

    Args:
        annotations: the pickle, such as "refcoco/refs(unc).p". Nothing in it is run.
        image_root: the folder of the pictures, train2014 of COCO.
        split: take only this split; None takes all.
        instances: the COCO instances file; None: instances.json beside the pickle.
        dataset: the name for the records; None: the name of the pickle's folder.
        clip: boxes that leave the picture by at most so many pixels are cut at its edge (annotations are rounded).
        allow_outside: take pictures that the annotations name by absolute paths or "..", wherever they lie.

    Raises:
        ValueError: a file or folder is missing, the pickle is refused or is no list of refs, an unknown split.
    """
    existing_folder(image_root, "image_root", "the pictures of COCO train2014")
    folder = os.path.dirname(os.path.abspath(annotations))
    refs = [with_text_keys(ref) for ref in _ref_list(annotations)]
    splits = sorted({str(ref["split"]) for ref in refs if isinstance(ref, dict) and "split" in ref})
    if split is not None and split not in splits:
        raise ValueError(f"{annotations}: has no split {split!r}; it has {', '.join(splits)}")
    data = load_instances(instances or os.path.join(folder, "instances.json"))
    by_id = {entry["id"]: entry for entry in data.annotations
             if isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))}
    split_by = re.fullmatch(r"refs\((\w+)\)\.p", os.path.basename(annotations))
    meta = {"dataset": dataset or os.path.basename(folder), "split_by": split_by.group(1) if split_by else ""}
    for place, ref in enumerate(refs):
        if split is None or not isinstance(ref, dict) or ref.get("split", split) == split:
            yield from _ref_drafts(ref, place, annotations, meta, data, by_id,
                                   PictureFolder(image_root, allow_outside), clip)


def _ref_list(path: str) -> list[Any]:
    refs = load_plain(path)
    if not isinstance(refs, list) or not refs:
        raise ValueError(f"{path}: expected a pickled list of refs, got {type(refs).__name__}"
                         + (" without entries" if isinstance(refs, list) else ""))
    return refs


def _ref_drafts(ref: Any, place: int, path: str, meta: dict[str, Any], data: Instances, by_id: dict[Any, Any],
                pictures: PictureFolder, clip: float) -> Iterator[Draft]:
    fault = _fault(ref, data, by_id)
    if fault:
        number = ref.get("ref_id", place) if isinstance(ref, dict) else place
        yield broken(f"{path}: ref {number}", key_from("ref", place), *fault)
        return
    annotation = by_id[ref["ann_id"]]
    category = annotation.get("category_id")
    image = data.images[annotation["image_id"]]
    known = {**meta, "split": ref["split"], "ref_id": ref["ref_id"], "ann_id": ref["ann_id"],
             "image": image["file_name"], "image_id": image["id"], **size_fields(image),
             "category": data.categories.get(category, "") if isinstance(category, (int, str)) else ""}
    # "refcoco" and "refcoco+" must not give the same keys.
    name = meta["dataset"].replace("+", "plus")
    for turn, sentence in enumerate(ref["sentences"]):
        sentence = with_text_keys(sentence)
        where = f"{path}: ref {ref['ref_id']} sentence {turn}"
        key = key_from(name, meta["split_by"] or "refs", ref["split"], ref["ref_id"], turn)
        expression = _expression(sentence)
        if expression is None:
            yield broken(where, key, "missing field", f"expected a sentence with 'sent' or 'raw', got {sentence!r}")
            continue
        yield Draft(where, key, pictures.file(image["file_name"]),
                    {**known, "sent_id": sentence.get("sent_id", turn), "expression": expression,
                     "boxes_xyxy_px": [from_xywh(annotation.get("bbox"))]}, clip_px=clip)


def _expression(sentence: Any) -> str | None:
    if not isinstance(sentence, dict):
        return None
    texts = (text_of(sentence.get(name)) for name in ("sent", "raw"))
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def _fault(ref: Any, data: Instances, by_id: dict[Any, Any]) -> tuple[str, str] | None:
    """Why a ref cannot be used: (reason, detail), or None."""
    if not isinstance(ref, dict):
        return "bad json", f"expected a dictionary, got {type(ref).__name__}"
    for name in _REF_FIELDS:
        if name not in ref:
            return "missing field", f"{name!r} is not among {sorted(map(str, ref))}"
    if not isinstance(ref["sentences"], (list, tuple)):
        return "missing field", f"expected a list of sentences, got {type(ref['sentences']).__name__}"
    if not isinstance(ref["ann_id"], (int, str)) or ref["ann_id"] not in by_id:
        return "missing field", f"annotation {ref['ann_id']!r} is not in {data.path}"
    image_id = by_id[ref["ann_id"]].get("image_id")
    if not isinstance(image_id, (int, str)) or image_id not in data.images:
        return "missing field", f"image {image_id!r} of annotation {ref['ann_id']!r} is not in {data.path}"
    if ref.get("image_id", image_id) != image_id:
        return "missing field", f"the ref names image {ref['image_id']!r}, but its annotation {ref['ann_id']!r} " \
                                f"belongs to image {image_id!r}"
    return None
