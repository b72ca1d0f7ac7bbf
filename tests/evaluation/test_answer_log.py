"""Answers on the disk: nothing whole is lost, nothing torn is read, and nobody else's answers are taken for one's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavg.evaluation.answer_log import AnswerLog, pack, read_answers, unpack
from megavg.evaluation.fingerprint import describe_checkpoint, describe_shards, open_set
from megavg.protocols.sample import RELATIVE_1000, Completion, Frame, Sample

ROOT = Path(__file__).resolve().parents[2]
FRAME = Frame(RELATIVE_1000, 640, 480, 644, 476)


def packed(key: str, text: str = "[1, 2, 3, 4]", shard: str = "a.tar") -> dict:
    sample = Sample(key, shard, None, 640, 480, "thing", ((0.0, 0.0, 1.0, 1.0),))
    return pack(sample, Completion(text, "json_relative_1000", FRAME, 7, True))


@settings(deadline=None, max_examples=50)
@given(text=st.text(), key=st.text(min_size=1))
def test_any_text_comes_back_as_it_was(tmp_path_factory, text, key):
    folder = tmp_path_factory.mktemp("log")
    log = AnswerLog(folder, 0)
    log.append([packed(key, text)])
    log.append([packed(key + "2", text)])
    log.close()
    found = read_answers(folder)
    assert list(found) == [("a.tar", key), ("a.tar", key + "2")]
    assert unpack(found["a.tar", key]) == Completion(text, "json_relative_1000", FRAME, 7, True)


def test_ranks_have_files_of_their_own_and_the_first_answer_stays(tmp_path):
    for rank, keys in enumerate((["a", "b"], ["b", "c"])):
        log = AnswerLog(tmp_path, rank)
        log.append([packed(key, f"rank {rank}") for key in keys])
        log.close()
    assert {key: answer["text"] for (_, key), answer in read_answers(tmp_path).items()} == {
        "a": "rank 0", "b": "rank 0", "c": "rank 1"}


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path, cut):
    log = AnswerLog(tmp_path, 0)
    log.append([packed("a"), packed("b")])
    log.close()
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert [key for _, key in read_answers(tmp_path)] == ["a"]
    again = AnswerLog(tmp_path, 0)
    again.append([packed("b")])
    again.close()
    assert [key for _, key in read_answers(tmp_path)] == ["a", "b"] and again.path.read_bytes().count(b"\n") == 2


def test_damage_in_the_middle_is_told(tmp_path):
    log = AnswerLog(tmp_path, 3)
    log.append([packed("a"), packed("b")])
    log.close()
    log.path.write_bytes(b"{}\n" + log.path.read_bytes())
    with pytest.raises(ValueError, match="rank-00003.jsonl: line 1 is no answer .*evaluation.overwrite=true"):
        read_answers(tmp_path)


WRITER = """
import sys
sys.path[0] = sys.argv[1]
from megavg.evaluation.answer_log import AnswerLog
from tests.evaluation.test_answer_log import packed
log = AnswerLog(sys.argv[2], 0)
for number in range(10_000):
    log.append([packed(f"{number:05d}", "x" * 3000)])
    print(number, flush=True)
"""


def test_what_append_has_returned_from_survives_a_kill(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE,
                               text=True)
    told = [int(process.stdout.readline()) for _ in range(6)][-1]
    process.send_signal(signal.SIGKILL)
    told = ([told] + [int(line) for line in process.communicate()[0].splitlines()])[-1]
    keys = [key for _, key in read_answers(tmp_path)]
    assert keys == [f"{number:05d}" for number in range(len(keys))] and len(keys) > told


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    mine = {"prompts": {"rec": "Find {expression}."}, "max_new_tokens": 64}
    assert open_set(tmp_path / "s", mine, False) == {}
    log = AnswerLog(tmp_path / "s", 0)
    log.append([packed("a")])
    log.close()
    assert list(open_set(tmp_path / "s", dict(reversed(mine.items())), False)) == [("a.tar", "a")]
    with pytest.raises(ValueError) as caught:
        open_set(tmp_path / "s", {**mine, "max_new_tokens": 65, "dtype": "float32"}, False)
    assert "max_new_tokens was 64, is 65; dtype was null, is \"float32\"" in str(caught.value)
    assert "evaluation.overwrite=true" in str(caught.value)
    assert list(open_set(tmp_path / "s", mine, False)) == [("a.tar", "a")], "a refusal changes nothing"
    (tmp_path / "s" / "notes.txt").write_text("mine")
    assert open_set(tmp_path / "s", {**mine, "max_new_tokens": 65}, True) == {}
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["fingerprint.json", "notes.txt"]


def test_answers_of_nobody_knows_whom_are_refused(tmp_path):
    AnswerLog(tmp_path, 0).close()
    with pytest.raises(ValueError, match="fingerprint.json is missing"):
        open_set(tmp_path, {}, False)


def save(folder: Path, **tensors) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def test_a_checkpoint_is_known_by_its_contents(tmp_path):
    import torch

    weights = {"a": torch.arange(100_000.0), "b": torch.ones(3)}
    first, copy = (describe_checkpoint(save(tmp_path / name, **weights)) for name in ("first", "copy"))
    os.utime(tmp_path / "copy" / "model.safetensors", (0, 0))
    assert first == copy == describe_checkpoint(tmp_path / "copy") and set(first) == {"config.json",
                                                                                      "model.safetensors"}
    trained = describe_checkpoint(save(tmp_path / "trained", a=weights["a"] + 1e-2, b=weights["b"]))
    one = describe_checkpoint(save(tmp_path / "one", a=weights["a"], b=torch.tensor([1.0, 1.0, 1.5])))
    renamed = describe_checkpoint(save(tmp_path / "renamed", a=weights["a"], c=weights["b"]))
    assert len({part["model.safetensors"] for part in (first, trained, one, renamed)}) == 4
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "y"}')
    assert describe_checkpoint(tmp_path / "copy") != first


def test_a_file_that_is_no_safetensors_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0[1, 2, 3]")
    with pytest.raises(ValueError, match="it is truncated or no safetensors file"):
        describe_checkpoint(tmp_path)


def test_shards_are_known_by_path_size_and_index(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 10)
    path = str(tmp_path / "a.tar")
    assert describe_shards([path, "https://x/b.tar"]) == [
        [path, 10, f"written at {os.stat(path).st_mtime_ns} ns"], ["https://x/b.tar", None, None]]
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"name": "a.tar", "num_samples": 1, "sha256": "5e"}]}))
    assert describe_shards([path]) == [[path, 10, "5e"]]


def test_shards_built_anew_are_noticed_where_nothing_but_their_content_has_changed(tmp_path):
    """Without an index.json, and with the same number of bytes."""
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"x" * 10)
    os.utime(shard, ns=(10 ** 18, 10 ** 18))
    before = {"shards": describe_shards([str(shard)])}
    open_set(tmp_path / "s", before, False)
    assert open_set(tmp_path / "s", {"shards": describe_shards([str(shard)])}, False) == {}, "nothing has changed"
    shard.write_bytes(b"y" * 10)
    with pytest.raises(ValueError, match="answers of another evaluation .shards was .*; choose another "
                                         "evaluation.output_dir, or set evaluation.overwrite=true"):
        open_set(tmp_path / "s", {"shards": describe_shards([str(shard)])}, False)


def test_a_job_that_starts_again_keeps_its_own_answers(tmp_path, monkeypatch):
    """Slurm repeats the command, with its overwrite=true."""
    monkeypatch.delenv("MEGAVG_JOB", raising=False)
    open_set(tmp_path, {"model": "old"}, overwrite=False)
    monkeypatch.setenv("MEGAVG_JOB", "c-1")
    assert open_set(tmp_path, {"model": "new"}, overwrite=True) == {}
    answers = tmp_path / "answers" / "rank-00000.jsonl"
    answers.parent.mkdir()
    answers.write_text("")
    open_set(tmp_path, {"model": "new"}, overwrite=True)
    assert answers.exists()
    monkeypatch.setenv("MEGAVG_JOB", "c-2")
    open_set(tmp_path, {"model": "new"}, overwrite=True)
    assert not answers.exists()
