"""Damaged checkpoints, full and read-only disks, a kill while one is written: told clearly, and none is lost."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavg.checkpoint.errors import CheckpointError
from megavg.checkpoint.manifest import read_manifest, wrong_files
from megavg.checkpoint.parts import Part
from megavg.checkpoint.train_state import Checkpoints, Snapshot, read_trainer_state
from megavg.checkpoint.train_state import checkpoints as checkpoints_of
from megavg.parallel.mcore import make_context, start_processes
from tests.distributed import run_ranks
from tests.tiny_runs import run_tree, training_lines
from tools.forked_ranks import Job

WIDTH = 60_000


def state(step: int) -> torch.Tensor:
    """What the whole job holds after ``step``, 480 kB."""
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step))


def open_store(folder: Path, **options) -> Checkpoints:
    return Checkpoints(folder, make_context(1, 1, torch.device("cpu")), **options)


def own_row(tensor: torch.Tensor) -> Part:
    rank = dist.get_rank()
    return Part("weights/a", tuple(tensor.shape), (rank, 0), (1, WIDTH), tensor.dtype, lambda: tensor[rank:rank + 1])


def save(store: Checkpoints, step: int, model: Path, part: Part | None = None) -> None:
    store.save(Snapshot(step, {"family": "none"}, {"data": {}}, "a: 1\n", model), [part or own_row(state(step))])
    store.wait()


def holds(store: Checkpoints, step: int) -> bool:
    """Whether the checkpoint of ``step`` is whole, and what this rank reads from it is what was saved."""
    path, tensor = store.folder / f"step-{step:06d}", torch.zeros(2, WIDTH)
    store.check(path)
    store.read(path, [own_row(tensor)])
    rank = dist.get_rank()
    return torch.equal(tensor[rank], state(step)[rank]) and read_trainer_state(path)["step"] == step


def error_of(function, *args) -> str | None:
    try:
        function(*args)
    except CheckpointError as error:
        return str(error)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    return folder


def two_steps(folder: Path, model: Path) -> None:
    store = open_store(folder)
    save(store, 1, model)
    save(store, 2, model)


def change(path: Path, edit) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip_a_bit(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


DAMAGES = {
    "a truncated file": (lambda step: change(step / "state/__0_0.distcp", lambda c: c[:-1000]),
                         r"state/__0_0.distcp has 24\d,\d\d\d bytes instead of 24\d,\d\d\d: it is truncated"),
    "one flipped bit": (lambda step: change(step / "state/__1_0.distcp", flip_a_bit),
                        "state/__1_0.distcp is damaged: its checksum is not that of the manifest.json"),
    "a missing file": (lambda step: (step / "state/__1_0.distcp").unlink(), "state/__1_0.distcp is missing"),
    "missing generators": (lambda step: (step / "rng/rank-00001.json").unlink(), "rng/rank-00001.json is missing"),
    "no list of tensors": (lambda step: (step / "state/.metadata").unlink(), r"state/.metadata is missing"),
    "another step": (lambda step: change(step / "trainer.json", lambda c: c.replace(b'"step": 2', b'"step": 3')),
                     "trainer.json is damaged: its checksum"),
    "an edited manifest": (lambda step: change(step / "manifest.json", lambda c: c.replace(b'"step": 2', b'"step": 3')),
                           "manifest.json is damaged: its own checksum does not fit; take the checkpoint before"),
    "a cut manifest": (lambda step: change(step / "manifest.json", lambda c: c[:100]), r"manifest.json is damaged \("),
    "an empty manifest": (lambda step: change(step / "manifest.json", lambda c: b""), r"manifest.json is damaged \("),
}


def look(folders: list[Path]) -> list[dict]:
    found = []
    for folder in folders:
        store, told, newest = open_store(folder), [], []
        error = error_of(lambda: newest.append(store.newest_whole(told.append)))
        found.append({"newest": newest and newest[0], "told": told, "error": error,
                      "step 2": error_of(store.check, folder / "step-000002")})
    return found


@pytest.fixture(scope="module")
def looked(model_files, tmp_path_factory) -> dict[str, list[dict]]:
    """What both ranks say of a folder of two checkpoints with each damage in the second."""
    base = tmp_path_factory.mktemp("damaged")
    run_ranks(2, two_steps, base / "whole", model_files)
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(base / "whole", base / name)
        damage(base / name / "step-000002")
    shutil.copytree(base / "one flipped bit", base / "all")
    (base / "all" / "step-000001" / "config.yaml").write_text("a: 2\n")
    shutil.copytree(base / "whole" / "step-000002", base / "unfinished" / "step-000002.tmp")
    names = ["whole", "all", "unfinished", "nothing", *DAMAGES]
    return dict(zip(names, zip(*run_ranks(2, look, [base / name for name in names]))))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_auto_takes_the_checkpoint_before(looked, name):
    for rank in looked[name]:
        assert rank["newest"].name == "step-000001" and rank["error"] is None
        (line,) = rank["told"]
        assert "step-000002 is passed over: " in line
        assert re.search(DAMAGES[name][1], line) and re.search(DAMAGES[name][1], rank["step 2"])


def test_a_whole_folder_and_one_without_checkpoints(looked):
    for rank in range(2):
        whole, unfinished, nothing = (looked[name][rank] for name in ("whole", "unfinished", "nothing"))
        assert whole["newest"].name == "step-000002" and not whole["told"] and whole["step 2"] is None
        assert unfinished["newest"] is nothing["newest"] is None and not unfinished["told"]
        assert "step-000002 is no whole checkpoint: it has no manifest.json" in nothing["step 2"]


def test_where_all_are_damaged_the_run_does_not_start_anew(looked):
    for rank in looked["all"]:
        assert rank["newest"] == []
        assert [line.split(" is passed over")[0][-6:] for line in rank["told"]] == ["000002", "000001"]
        assert re.search("none of the 2 checkpoints in .*all is whole; the newest: .*step-000002/state/__1_0.distcp is "
                         "damaged", rank["error"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of 64 MB of its own."""
    folder = tmp_path_factory.mktemp("disk")
    if shutil.which("mount") is None:
        pytest.skip("there is no command mount, which makes a disk that can be filled")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk that can be filled can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def on_first(function, *args) -> None:
    """Call it on rank 0, while the others wait."""
    if dist.get_rank() == 0:
        function(*args)
    dist.barrier()


def fill(disk: Path, left: int = 65536) -> None:
    """Leave so many bytes, for the small files beside a checkpoint."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - left))


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def trouble(disk: Path, in_background: bool, model: Path) -> dict:
    """Two saves that fail between three that work."""
    store = open_store(disk / str(in_background), in_background=in_background)
    found = {"there": []}

    def note() -> None:
        dist.barrier()
        found["there"].append(sorted(path.name for path in store.folder.iterdir()))
        dist.barrier()

    save(store, 1, model)
    on_first(fill, disk)
    found["full"] = error_of(save, store, 2, model)
    note()
    found["kept when full"] = holds(store, 1)
    on_first((disk / "filler").unlink)
    save(store, 3, model)
    on_first(remount, disk, "ro")
    found["read-only"] = error_of(save, store, 4, model)
    found["kept when read-only"] = holds(store, 3)
    on_first(remount, disk, "rw")
    note()
    save(store, 5, model)
    found["after"] = holds(store, 5)
    note()
    return found


@pytest.mark.parametrize("in_background", [False, True], ids=["foreground", "background"])
def test_a_full_and_a_read_only_disk(disk, model_files, in_background):
    first, second = run_ranks(2, trouble, disk, in_background, model_files)
    assert first["there"] == [["step-000001"], ["step-000001", "step-000003"], ["step-000003", "step-000005"]]
    for found in (first, second):
        for name, step, last, cause in (("full", 2, 1, "No space left"), ("read-only", 4, 3, "Read-only file system")):
            assert re.search(rf"the checkpoint .*step-00000{step} could not be written \(rank \d: .*{cause}.*\); make "
                             rf"room or mend the folder's permissions, and resume: the last whole one is "
                             rf".*step-00000{last}$", found[name]), found[name]
        assert found["kept when full"] and found["kept when read-only"] and found["after"]


def killed_in_the_second(folder: str, model: str) -> int:
    """Rank 1 gets SIGKILL when half of its part of step 2 is written."""
    start_processes(timeout_minutes=3)
    store, tensor = open_store(Path(folder)), state(2)
    save(store, 1, Path(model))
    part = own_row(tensor)

    def fetch() -> torch.Tensor:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return part.fetch()

    save(store, 2, Path(model), Part(part.name, part.shape, part.offsets, part.sizes, part.dtype, fetch))
    return 0


def save_second(folder: Path, model: Path) -> tuple:
    store = open_store(folder)
    newest = store.newest_whole(print)
    held = holds(store, 1)
    save(store, 2, model)
    return newest.name, held, holds(store, 2)


def test_a_kill_while_one_is_written_leaves_what_the_next_run_clears_away(model_files, tmp_path):
    folder = tmp_path / "checkpoints"
    with Job(tmp_path / "log", 2, killed_in_the_second, str(folder), str(model_files)) as job:
        deadline = time.monotonic() + 60
        while job.exit_codes[1] is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert job.exit_codes[1] == -signal.SIGKILL, job.last_lines()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002.tmp"]
    assert run_ranks(2, save_second, folder, model_files) == [("step-000001", True, True)] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]


def enter(tree: dict, before_save=None) -> tuple[int, str]:
    """What ``megavg/train.py`` ends with and says; ``before_save(step)`` comes before each checkpoint."""
    from megavg.trainer.config import resolve
    from megavg.trainer.entry import run
    from megavg.trainer.trainer import Trainer

    def make(config) -> Trainer:
        trainer = Trainer(config)
        save_state = trainer.state.save

        def observed(step: int) -> Path:
            if before_save:
                before_save(step)
            return save_state(step)

        trainer.state.save = observed
        return trainer

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = run(lambda: resolve(tree), make)
    return code, said.getvalue()


def whole_runs(disk: Path, trees: dict[str, dict]) -> dict[str, tuple[int, str]]:
    found = {}

    def fill_before_second(step: int) -> None:
        if step == 2:
            on_first(fill, disk)

    for name in ("foreground", "background"):
        found[name] = enter(trees[name], fill_before_second)
        on_first((disk / "filler").unlink)
    found["again"] = enter(trees["foreground"])
    checkpoints = Path(trees["foreground"]["trainer"]["output_dir"]) / "checkpoints"
    on_first(change, checkpoints / "step-000003" / "trainer.json", flip_a_bit)
    for name in ("damaged", "no folder", "older", "alone", "another family"):
        found[name] = enter(trees[name])
    return found


@pytest.fixture(scope="module")
def entered(disk, checkpoints, scene_shards):
    """Exit status and words of each rank for runs of 3 supervised steps on a disk that is full at the second."""
    def tree(name: str, *overrides: str, family: str = "qwen3_vl") -> dict:
        return run_tree(checkpoints(family, num_layers=2, vision_depth=2), scene_shards(16), disk / name,
                        "algorithm={name: sft}", "trainer.save_every=1", "trainer.resume=auto", *overrides)

    def resume(step: str, *overrides: str, out: str = "other", **options) -> dict:
        return tree(out, f"trainer.resume={disk / 'foreground' / 'checkpoints' / step}", *overrides, **options)

    trees = {"foreground": tree("foreground"), "background": tree("background", "trainer.save_in_background=true"),
             "damaged": tree("foreground"), "no folder": resume("step-000007"),
             "older": resume("step-000002", out="foreground"),
             "another family": resume("step-000002", family="qwen2_vl"),
             "alone": tree("alone", f"trainer.resume={disk / 'alone' / 'checkpoints' / 'step-000001'}")}
    (disk / "other").mkdir()
    (disk / "alone" / "checkpoints" / "step-000001").mkdir(parents=True)
    found = run_ranks(2, whole_runs, disk, trees)
    return {name: [rank[name] for rank in found] for name in found[0]}


@pytest.mark.parametrize("name", ["foreground", "background"])
def test_a_run_on_a_full_disk_ends_with_status_2(entered, disk, name):
    (code, said), (other_code, _) = entered[name]
    assert (code, other_code) == (2, 2)
    assert re.search("error: the checkpoint .*step-000002 could not be written .*No space left.*; make room .*the last "
                     "whole one is .*step-000001", said), said


def test_it_goes_on_when_there_is_room(entered, disk):
    assert [rank[0] for rank in entered["again"]] == [0, 0] and "resumed after step 1" in entered["again"][0][1]
    assert [line["step"] for line in training_lines(disk / "foreground")] == [1, 2, 3]
    kept = [checkpoints_of(disk / name / "checkpoints") for name in ("foreground", "background")]
    assert [[path.name for path in paths] for paths in kept] == [["step-000002", "step-000003"], ["step-000001"]]


def test_a_run_passes_over_a_damaged_checkpoint_and_says_so(entered, disk):
    assert [rank[0] for rank in entered["damaged"]] == [0, 0]
    said = entered["damaged"][0][1]
    assert re.search("step-000003 is passed over: .*trainer.json is damaged", said)
    assert "resumed after step 2" in said
    mended = disk / "foreground" / "checkpoints" / "step-000003"
    assert wrong_files(mended, read_manifest(mended)["files"]) == []


@pytest.mark.parametrize("name,words", [
    ("no folder", "trainer.resume=.*step-000007 is no folder; give auto, or a folder such as .*step-000100"),
    ("older", "trainer.resume=.*step-000002 is older than step-000003, which this run has reached; to branch off"),
    ("alone", "step-000001 is no whole checkpoint: it has no manifest.json"),
    ("another family", "step-000002 is a checkpoint of a qwen3_vl model and model.path=.* is a qwen2_vl model"),
])
def test_what_cannot_be_gone_on_with_is_refused_with_the_reason(entered, disk, name, words):
    assert [rank[0] for rank in entered[name]] == [2, 2]
    assert re.search(f"error: .*{words}", entered[name][0][1]), entered[name][0][1]
    assert not list((disk / "other").iterdir()), "nothing was begun"
