"""The folder of a shard set, while it is being built and when it is published: with an index, the set is whole."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from megavg.data.builder.shard import read_entry, tar_path, write_json
from megavg.data.writer import INDEX_NAME
from megavg.protocols.restarts import is_of_this_job, note_job

UNFINISHED = ".unfinished"
LEFT_OUT_NAME = "left_out.jsonl"
_PLAN = "plan.json"


class BuildFolder:
    """``out_dir`` and its hidden folder ".unfinished", where finished shards wait for the others.

    Args:
        out_dir: where the set will stand.
        summary: what tells this build from another (``Plan.summary``).
    """

    def __init__(self, out_dir: str, summary: dict[str, Any]):
        self.out_dir, self.summary = out_dir, summary
        self.unfinished = os.path.join(out_dir, UNFINISHED)

    def open(self, overwrite: bool) -> dict[str, Any] | None:
        """Begin a build, or continue the one that was interrupted; call it on one rank. ``overwrite`` begins anew,
        but not again where a job is started again.

        Returns:
            The index, when the interrupted build had only its own traces left to clear away; else None.

        Raises:
            ValueError: the folder holds another set or another unfinished build, and ``overwrite`` is not given.
        """
        if os.path.exists(self.out_dir) and not os.path.isdir(self.out_dir):
            raise ValueError(f"{self.out_dir} is a file; name a folder")
        overwrite = overwrite and not is_of_this_job(self.unfinished)
        if overwrite:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        saved, index = _read(os.path.join(self.unfinished, _PLAN)), _read(os.path.join(self.out_dir, INDEX_NAME))
        if saved == self.summary and index is not None and self._published(index):
            shutil.rmtree(self.unfinished)
            return index
        if not overwrite:
            self._refuse_another(saved, index)
        if saved != self.summary:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            os.makedirs(self.unfinished)
            note_job(self.unfinished)
            write_json(os.path.join(self.unfinished, _PLAN), self.summary, indent=1)
        return None

    def _published(self, index: dict[str, Any]) -> bool:
        """True when ``index`` is of this very build, which was killed before it had removed its hidden folder."""
        entries = [read_entry(self.unfinished, int(name[:-5]), self.summary["fingerprint"])
                   for name in sorted(os.listdir(self.unfinished)) if name[:-5].isdecimal() and name.endswith(".json")]
        built = [entry["sha256"] for entry in entries if entry and entry["num_samples"]]
        return bool(built) and built == [entry.get("sha256") for entry in index.get("shards", ())]

    def _refuse_another(self, saved: dict[str, Any] | None, index: dict[str, Any] | None) -> None:
        if saved is not None and saved != self.summary:
            names = sorted(name for name in saved.keys() | self.summary.keys() if name != "fingerprint"
                           and saved.get(name) != self.summary.get(name))
            differing = "; ".join(f"{name} was {saved.get(name)!r}, is {self.summary.get(name)!r}" for name in names)
            raise ValueError(f"{self.out_dir} holds an unfinished build of another source or with other options "
                             f"({differing or 'fields or pictures of its samples differ'}); give the same ones to "
                             "continue it, add --overwrite to begin anew, or choose another folder")
        # Where this very build has begun beside a finished set, it was told to overwrite it.
        if saved is None and os.path.isdir(self.out_dir) and os.listdir(self.out_dir):
            what = "a finished set" if index is not None else "files and"
            raise ValueError(f"{self.out_dir} is not empty: it holds {what} that this build would replace; add "
                             "--overwrite, or choose another folder")

    def leave(self, num_ranks: int) -> str:
        """After a failure: keep what a second run can use, and say so; without any of it the hidden folder goes."""
        try:
            finished = sum(name.endswith(".tar") for name in os.listdir(self.unfinished))
        except OSError:
            return ""
        if finished:
            return (f"; {finished} finished shards are kept in {self.unfinished}, the same command, without "
                    "--overwrite, continues after them")
        if num_ranks == 1:  # another rank may still be at work in it
            shutil.rmtree(self.unfinished, ignore_errors=True)
        return ""

    def publish(self, index: dict[str, Any], numbers: list[int], left_out: list[dict[str, str]]) -> None:
        """Move the finished shards to their places, the index last; older tars of the folder are removed.

        When a publication is killed, no index stands; the next run builds again what was moved, to the same bytes.

        Args:
            index: to be written; its shards are in the order of ``numbers``.
            numbers: under which the shards were built; the published names count without gaps.
            left_out: rows of the report beside the index; no file is written for none.
        """
        names = [entry["name"] for entry in index["shards"]]
        missing = [path for path in (tar_path(self.unfinished, number) for number in numbers)
                   if not os.path.isfile(path)]
        if missing:
            raise ValueError(f"{len(missing)} finished shards are gone, the first is {missing[0]}; all processes must "
                             f"see one folder {self.out_dir}. Run the same command again")
        for name in os.listdir(self.out_dir):
            if name in (INDEX_NAME, LEFT_OUT_NAME) or name.endswith(".tar") and name not in names:
                os.remove(os.path.join(self.out_dir, name))
        for number, name in zip(numbers, names):
            os.replace(tar_path(self.unfinished, number), os.path.join(self.out_dir, name))
        if left_out:
            self._write_left_out(left_out)
        write_json(os.path.join(self.unfinished, INDEX_NAME), index, indent=1)
        os.replace(os.path.join(self.unfinished, INDEX_NAME), os.path.join(self.out_dir, INDEX_NAME))
        shutil.rmtree(self.unfinished)

    def _write_left_out(self, left_out: list[dict[str, str]]) -> None:
        beside = os.path.join(self.unfinished, LEFT_OUT_NAME)
        with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
            for row in left_out:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(beside, os.path.join(self.out_dir, LEFT_OUT_NAME))


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
