"""The benchmark of streaming runs, counts every sample in every reader and writes its figures."""

from __future__ import annotations

import json

from tools.bench_streaming import main


def test_all_readers_give_the_same_samples(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["--images", "10", "--size", "64x48", "--per-shard", "4", "--turns", "2", "--batch", "4",
                 "--workers", "1", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["samples"] == 10 and set(figures["readers"]) == {
        "webdataset", "PromptSource", "iterate_all", "webdataset, 1 workers", "PromptSource, 1 workers"}
    printed = capsys.readouterr().out
    for name, row in figures["readers"].items():
        assert len(row["all"]) == 2 and row["samples_per_second"] > 0 and row["processor_ms_per_sample"] > 0
        assert row["ratio"] == row["samples_per_second"] / figures["readers"][row["beside"]]["samples_per_second"]
        assert name in printed
