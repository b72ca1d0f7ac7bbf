"""The tables that papers print: RefCOCO by split, ScreenSpot by platform and kind, any set by what its records say."""

from __future__ import annotations

import random

import pytest

from megavg.evaluation.figures import figures
from megavg.evaluation.rows import answer_row
from megavg.evaluation.tables import (REFCOCO_SPLITS, benchmark_of, benchmark_tables, breakdown, groups_markdown,
                                      markdown, refcoco_columns, refcoco_left_out, refcoco_markdown, screenspot,
                                      screenspot_markdown)
from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, Sample

FRAME = Frame(RELATIVE_1000, 1000, 1000, 560, 560)


def row_of(key: str, text: str, task: str = "rec", **meta) -> dict:
    sample = Sample(key, "a.tar", None, 1000, 1000, "thing", ((0.0, 0.0, 100.0, 100.0),), meta, task)
    return answer_row(sample, Completion(text, "json_relative_1000", FRAME))


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def screenspot_rows() -> list[dict]:
    """Cells of different sizes, one without any sample, so that the two averages differ."""
    rng = random.Random(0)
    rows = []
    for platform, kind, count in (("mobile", "text", 30), ("mobile", "icon", 11), ("desktop", "text", 7),
                                  ("desktop", "icon", 2), ("web", "text", 19)):
        for i in range(count):
            text = rng.choice(['{"point_2d": [50, 50]}', '{"point_2d": [500, 50]}', "over there"])
            rows.append(row_of(f"{platform}{kind}{i}", text, "point", platform=platform, data_type=kind))
    return rows


def test_screenspot_equals_a_plain_loop():
    rows = screenspot_rows()
    table = screenspot(rows)
    right: dict = {}
    for row in rows:
        cell = right.setdefault((row["meta"]["platform"], row["meta"]["data_type"]), [0, 0])
        cell[0] += row["text"] == '{"point_2d": [50, 50]}'
        cell[1] += 1
    assert {(c["platform"], c["data_type"]): (c["accuracy"], c["num_samples"]) for c in table["cells"]} == {
        name: (hits / count, count) for name, (hits, count) in right.items()}
    assert table["micro"] == sum(hits for hits, _ in right.values()) / 69
    assert table["macro"] == pytest.approx(sum(hits / count for hits, count in right.values()) / 5)
    assert abs(table["micro"] - table["macro"]) > 0.01
    mobile = next(part for part in table["platforms"] if part["platform"] == "mobile")
    assert mobile["num_samples"] == 41
    assert mobile["accuracy"] == (right["mobile", "text"][0] + right["mobile", "icon"][0]) / 41


def test_screenspot_in_markdown():
    table = screenspot(screenspot_rows())
    text = screenspot_markdown(table)
    lines = cells(text)
    assert lines[0] == ["platform", "text", "icon", "all"] and [line[0] for line in lines[2:]] == [
        "desktop", "mobile", "web"]
    assert lines[4][2] == "-" and lines[3][1].endswith("(30)")
    assert f"Micro average (over samples) {100 * table['micro']:.1f}" in text
    assert f"macro average (over the 5 cells) {100 * table['macro']:.1f}" in text


def refcoco_rows() -> dict[str, list[dict]]:
    """A set for each of seven splits, the eighth together with training samples and RefCOCOg's other partition."""
    right, wrong, half = "[0, 0, 100, 100]", "[500, 500, 600, 600]", "[0, 0, 100, 50]"
    sets = {}
    for i, (dataset, split) in enumerate(REFCOCO_SPLITS[:-1]):
        sets[f"set{i}"] = [row_of(f"{i}-{k}", text, dataset=dataset, split=split,
                                  split_by="umd" if dataset == "refcocog" else "unc")
                           for k, text in enumerate([right] * (i + 1) + [wrong, half])]
    sets["rest"] = [row_of("a", right, dataset="refcocog", split="test", split_by="umd"),
                    row_of("b", wrong, dataset="refcocog", split="train", split_by="umd"),
                    row_of("c", wrong, dataset="refcocog", split="val", split_by="google"),
                    row_of("d", wrong, dataset="elsewhere", split="test")]
    return sets


def test_refcoco_has_a_column_for_each_official_split():
    columns = refcoco_columns(refcoco_rows())
    assert list(columns) == list(REFCOCO_SPLITS)
    for i, split in enumerate(REFCOCO_SPLITS[:-1]):
        assert columns[split]["num_samples"] == i + 3
        assert columns[split]["acc_at_50"] == (i + 1) / (i + 3)
        assert columns[split]["acc_at_50_inclusive"] == (i + 2) / (i + 3)
    assert (columns["refcocog", "test"]["num_samples"], columns["refcocog", "test"]["acc_at_50"]) == (1, 1)


def test_refcoco_in_markdown_strict_and_inclusive():
    columns = refcoco_columns(refcoco_rows())
    lines = cells(refcoco_markdown(columns))
    assert lines[0][1:] == ["refcoco val", "refcoco testA", "refcoco testB", "refcoco+ val", "refcoco+ testA",
                            "refcoco+ testB", "refcocog val", "refcocog test", "mean of 8"]
    strict, inclusive = (line[1:] for line in lines[2:4])
    assert strict[0] == "33.3" and inclusive[0] == "66.7"
    mean = (sum((i + 1) / (i + 3) for i in range(7)) + 1) / 8
    assert strict[-1] == f"{100 * mean:.1f}"
    del columns["refcoco+", "val"]
    assert [cells(refcoco_markdown(columns))[2][i] for i in (4, 9)] == ["-", "-"], "no mean of what is not there"


def test_a_sample_in_two_sets_counts_once_in_its_split():
    rows = [row_of("a", "[0, 0, 100, 100]", dataset="refcoco", split="val")]
    assert refcoco_columns({"one": rows, "two": rows})["refcoco", "val"]["num_samples"] == 1


@pytest.mark.parametrize("dataset, split_by, official", [
    ("refcoco", "unc", True), ("refcoco", "", True), ("refcoco", "google", False), ("refcoco", "umd", False),
    ("RefCOCO+", "unc", True), ("refcoco+", "google", False), ("refcocog", "umd", True), ("refcocog", "google", False),
    ("refcocog", "unc", False),
])
def test_a_split_of_another_partition_is_another_set(dataset, split_by, official):
    rows = [row_of("a", "[0, 0, 100, 100]", dataset=dataset, split="val", split_by=split_by)]
    name = dataset.lower()
    assert list(refcoco_columns({"s": rows})) == ([(name, "val")] if official else [])
    assert refcoco_left_out({"s": rows, "again": rows}) == ({} if official else {f"{name} by {split_by} val": 1})


def test_what_is_in_no_official_split_is_told():
    sets = refcoco_rows()
    sets["rest"].append(row_of("e", "", dataset="refcoco", split="val", split_by="google"))
    sets["rest"].append(row_of("f", "", dataset="RefCOCO_unc", split="testA"))
    sets["rest"].append(row_of("g", "", dataset="refcoco"))
    assert refcoco_left_out(sets) == {"refcoco by google val": 1, "refcoco without a split": 1,
                                      "refcocog by google val": 1, "refcocog train": 1, "refcocounc testA": 1}


def test_one_set_of_two_partitions_is_broken_down_by_both():
    rows = [row_of(by, "[0, 0, 100, 100]" if by == "unc" else "no", dataset="refcoco", split="val", split_by=by)
            for by in ("google", "unc")]
    tables = benchmark_tables(rows, benchmark_of(rows), ())
    assert tables["group_by"] == ["dataset", "split_by", "split"]
    assert [(group["split_by"], group["acc_at_50"]) for group in tables["groups"]] == [("google", 0), ("unc", 1)]


@pytest.mark.parametrize("name", ["refcoco+", "refcocoplus", "refcoco_plus", "RefCOCO+"])
def test_names_of_refcoco_plus(name):
    assert list(refcoco_columns({"s": [row_of("a", "", dataset=name, split="val")]})) == [("refcoco+", "val")]


def test_the_benchmark_is_seen_in_the_records():
    assert benchmark_of(screenspot_rows()) == "screenspot"
    assert benchmark_of([row_of("a", "", "point", platform="linux", data_type="text", group="CAD")]) == "screenspot_pro"
    assert benchmark_of(refcoco_rows()["set0"]) == "refcoco" and benchmark_of([row_of("a", "")]) is None
    with pytest.raises(ValueError, match="screenspot takes samples of task 'point' whose records say platform and dat"):
        benchmark_of(refcoco_rows()["set0"], "screenspot")
    with pytest.raises(ValueError, match="'b' of 'a.tar' has task 'rec' and says"):
        benchmark_of([*refcoco_rows()["set0"], row_of("b", "")], "refcoco")


def test_screenspot_pro_is_broken_down_by_group():
    rows = [row_of(f"{group}{kind}", '{"point_2d": [50, 50]}', "point", platform="linux", data_type=kind, group=group)
            for group in ("CAD", "Dev") for kind in ("text", "icon")]
    table = benchmark_tables(rows, benchmark_of(rows), ())["screenspot"]
    assert [(c["group"], c["data_type"]) for c in table["cells"]] == [("CAD", "icon"), ("CAD", "text"),
                                                                      ("Dev", "icon"), ("Dev", "text")]
    assert cells(screenspot_markdown(table))[0] == ["group", "text", "icon", "all"]


def test_any_set_is_broken_down_by_any_field():
    rows = [row_of("a", "[0, 0, 100, 100]", split="x"), row_of("b", "no", split="x"), row_of("c", "no")]
    groups = breakdown(rows, ("split",))
    assert groups == [{"split": "-", **figures(rows[2:])}, {"split": "x", **figures(rows[:2])}]
    assert cells(groups_markdown(groups, ("split",)))[3] == ["x", "50.0", "50.0", "2"]


def test_markdown_cells_cannot_break_the_table():
    lines = markdown(["a", "b"], [["x|y\nz", "1"]]).splitlines()
    assert len(lines) == 3 and "x\\|y z" in lines[2] and len({len(line) for line in lines}) == 1
