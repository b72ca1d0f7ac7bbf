"""RefCOCO's pickles and instances, written here from the authors' definition, and pickles that must not be run."""

from __future__ import annotations

import copyreg
import json
import os
import pickle

import pytest

from megavg.data.readers.plain_pickle import load_plain
from megavg.data.readers.refcoco import read
from megavg.data.sample import SampleError, check_sample


def ref(number: int, split: str = "train", sentences: tuple[str, ...] = ("the lady with the blue shirt",), **changes):
    """A ref as refer.py documents it."""
    return {"ref_id": number, "ann_id": 100 + number, "image_id": 7, "category_id": 1, "split": split,
            "file_name": f"COCO_train2014_000000000007_{number}.jpg", "sent_ids": [10 * number],
            "sentences": [{"sent_id": 10 * number + turn, "sent": text, "raw": text.upper(), "tokens": text.split()}
                          for turn, text in enumerate(sentences)], **changes}


def python_2_pickle(refs: list[dict]) -> bytes:
    """The pickle, protocol 0, that Python 2 writes of ``refs`` with byte strings, ints, lists and dictionaries."""
    def dump(value) -> bytes:
        if isinstance(value, dict):
            return b"(d" + b"".join(dump(name) + dump(entry) + b"s" for name, entry in value.items())
        if isinstance(value, list):
            return b"(l" + b"".join(dump(entry) + b"a" for entry in value)
        if isinstance(value, int):
            return b"I%d\n" % value
        text = value.encode("utf-8") if isinstance(value, str) else value
        return b"S" + ("'" + "".join(chr(c) if 32 <= c < 127 and c not in b"'\\" else f"\\x{c:02x}" for c in text)
                       + "'").encode() + b"\n"
    return dump(refs) + b"."


@pytest.fixture
def folder(tmp_path, picture):
    """Factory of a refcoco folder from refs or the bytes of a pickle."""
    def write(refs, name: str = "refs(unc).p", dataset: str = "refcoco", protocol: int = 2, **changes) -> dict:
        picture("train2014/COCO_train2014_000000000007.jpg")
        root = tmp_path / dataset
        root.mkdir(exist_ok=True)
        content = {"images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 40, "height": 30}],
                   "categories": [{"id": 1, "name": "person"}],
                   "annotations": [{"id": 100 + n, "image_id": 7, "category_id": 1, "bbox": [n, 1, 10.5, 20],
                                    "segmentation": [[0, 0, 1, 1, 2, 2]]} for n in range(6)], **changes}
        (root / "instances.json").write_text(json.dumps(content))
        data = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol)
        (root / name).write_bytes(data)
        return {"annotations": str(root / name), "image_root": str(tmp_path / "train2014")}
    return write


REFS = [ref(1, sentences=("left lady", "lady")), ref(2, "val"), ref(3, "testA"), ref(4, "testB")]


@pytest.mark.parametrize("data", [pickle.dumps(REFS, 0), pickle.dumps(REFS, 2), pickle.dumps(REFS, 4),
                                  python_2_pickle(REFS)], ids=["protocol 0", "protocol 2", "protocol 4", "python 2"])
def test_one_sample_per_sentence(folder, data):
    samples = [draft.load() for draft in read(**folder(data))]
    assert [s.expression for s in samples[:2]] == ["left lady", "lady"] and len(samples) == 5
    assert samples[0].boxes_xyxy_px == ((1.0, 1.0, 11.5, 21.0),) and samples[0].task == "rec"
    assert samples[1].meta == {"dataset": "refcoco", "split_by": "unc", "split": "train", "ref_id": 1, "sent_id": 11,
                               "ann_id": 101, "image_id": 7, "category": "person",
                               "image": "COCO_train2014_000000000007.jpg"}
    assert len({s.key for s in samples}) == 5
    for sample in samples:
        check_sample(sample)


@pytest.mark.parametrize("split, count", [("train", 2), ("val", 1), ("testA", 1), ("testB", 1), (None, 5)])
def test_splits(folder, split, count):
    assert len(list(read(**folder(REFS), split=split))) == count


def test_an_unknown_split_names_those_there_are(folder):
    with pytest.raises(ValueError, match=r"no split 'test'; it has testA, testB, train, val"):
        next(read(**folder(REFS), split="test"))


def test_keys_of_the_three_sets_differ(folder):
    keys = [next(read(**folder(REFS, name, dataset))).key for dataset, name in
            (("refcoco", "refs(unc).p"), ("refcoco", "refs(google).p"), ("refcoco+", "refs(unc).p"),
             ("refcocog", "refs(umd).p"))]
    assert len(set(keys)) == 4
    assert next(read(**folder(REFS, "refs(umd).p", "refcocog"))).load().meta["split_by"] == "umd"


def test_texts_of_python_2_in_utf_8_and_latin_1(folder):
    refs = [ref(1), ref(2)]
    refs[0]["sentences"][0]["sent"] = "café".encode("utf-8")
    refs[1]["sentences"][0]["sent"] = "café".encode("latin-1")
    assert [draft.load().expression for draft in read(**folder(python_2_pickle(refs)))] == ["café", "café"]


def test_raw_stands_in_for_an_empty_sentence(folder):
    refs = [ref(1, sentences=("", "x"))]
    refs[0]["sentences"][0]["raw"] = " The Lady "
    refs[0]["sentences"].append({"sent_id": 5, "tokens": []})
    drafts = list(read(**folder(refs)))
    assert [draft.load().expression for draft in drafts[:2]] == ["The Lady", "x"]
    with pytest.raises(SampleError, match="ref 1 sentence 2.*missing field.*'sent' or 'raw'"):
        drafts[2].load()


class _Runs:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_not_run(folder, tmp_path, protocol):
    flag = tmp_path / "was_run"
    data = pickle.dumps([_Runs(f"touch {flag}")], protocol)
    assert pickle.loads(data) == [0] and flag.exists()  # it is a real one
    flag.unlink()
    with pytest.raises(ValueError, match=r"refused, it asks for (posix|nt)\.system.*nothing of it was run"):
        next(read(**folder(data)))
    assert not flag.exists()


@pytest.mark.parametrize("data, words", [
    (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"), (b"(S'ls'\nios\nsystem\n.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"), (b"Pmodule\n.", "persistent"),
    (b"\x80\x02\x82\xf0.", "posix.getcwd"), (b"\x80\x02r\xff\xff\xff\x7f.", "underflow"),
])
def test_other_ways_to_code_are_refused(tmp_path, data, words):
    path = tmp_path / "x.p"
    path.write_bytes(data)
    copyreg.add_extension("posix", "getcwd", 0xf0)  # a number then stands for the name
    try:
        with pytest.raises(ValueError, match=f"x.p: refused, .*{words}"):
            load_plain(str(path))
    finally:
        copyreg.remove_extension("posix", "getcwd", 0xf0)


@pytest.mark.parametrize("data, words", [
    (b"", "refused"), (pickle.dumps(REFS)[:-40], "refused"), (b"no pickle", "refused"),
    (pickle.dumps({"refs": []}), "expected a pickled list of refs, got dict"),
    (pickle.dumps([]), "expected a pickled list of refs, got list without entries"),
])
def test_no_refs_file(folder, data, words):
    with pytest.raises(ValueError, match=words):
        next(read(**folder(data)))


@pytest.mark.parametrize("bad, words", [
    ("text", "expected a dictionary"), ({"ref_id": 3, "split": "train"}, "'ann_id' is not among"),
    (ref(77), "annotation 177 is not in .*instances.json"), (ref(1, image_id=8), "the ref names image 8"),
    (ref(1, sentences=(), **{}) | {"sentences": None}, "expected a list of sentences"),
    (ref(5), "image 9 of annotation 105 is not in"), (ref(4), "box outside image"),
])
def test_a_bad_ref_is_named_and_spoils_no_other(folder, bad, words):
    boxes = [{"id": 100 + n, "image_id": 9 if n == 5 else 7, "category_id": 1,
              "bbox": [n, 1, 90 if n == 4 else 10, 20]} for n in range(6)]
    drafts = list(read(**folder([bad, ref(2)], annotations=boxes)))
    assert len(drafts) == 2 and drafts[1].load().expression == "the lady with the blue shirt"
    with pytest.raises(SampleError, match=words) as caught:
        drafts[0].load()
    assert "refs(unc).p: ref" in str(caught.value)


def test_missing_files(folder, tmp_path):
    arguments = folder(REFS)
    with pytest.raises(ValueError, match="image_root=.*train2014.*does not exist"):
        next(read(arguments["annotations"], str(tmp_path / "no" / "train2014")))
    with pytest.raises(ValueError, match="cannot read annotations .*gone.p"):
        next(read(str(tmp_path / "gone.p"), arguments["image_root"]))
    with pytest.raises(ValueError, match="cannot read annotations .*gone.json"):
        next(read(**arguments, instances=str(tmp_path / "gone.json")))
