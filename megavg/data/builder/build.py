"""Build a shard set from drafts with many processes or MPI ranks; it holds the same bytes whatever their number."""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Iterable

from megavg.data.builder.duplicates import candidates, hash_sources, pairs, sources_to_hash
from megavg.data.builder.folder import BuildFolder
from megavg.data.builder.options import BuildOptions
from megavg.data.builder.plan import DUPLICATE, UNFIT, Plan, drop, make_plan
from megavg.data.builder.pool import run_jobs
from megavg.data.builder.ranks import Ranks, RanksError
from megavg.data.builder.shard import ShardJob, build_shard, check_skipped
from megavg.data.readers.base import Draft
from megavg.data.sample import SampleError
from megavg.data.writer import FORMAT_VERSION

_NUM_LABELS = 100
_NUM_FIRST = 5


def build_shards(drafts: Iterable[Draft], out_dir: str, options: BuildOptions = BuildOptions(), num_processes: int = 1,
                 ranks: Ranks = Ranks(), overwrite: bool = False,
                 progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Write the samples of ``drafts`` as shards and ``index.json`` into ``out_dir``; return the index.

    Drafts are numbered, and shard k holds the numbers k N to (k + 1) N, so its bytes depend on the drafts and the
    options alone. Finished shards wait in ``out_dir/.unfinished``; all are moved to their places when the last one is
    done, and the index follows them: without an index a set is not complete. After a kill, the same call continues
    after the shards that were finished. Bad samples that were left out are listed in ``left_out.jsonl``.

    All drafts are held in memory (about 1 KB each), on every rank; pictures are held one at a time and process. Two
    builds may not run in one folder at once.

    Args:
        drafts: in a fixed order: a second run, and every rank, must get the same ones.
        num_processes: of this rank. With more than one, call this below ``if __name__ == "__main__":``.
        ranks: rank r of R builds the shards r, r + R, ...; all must see the same ``out_dir``.
        overwrite: replace what ``out_dir`` holds: all its ``*.tar``, index, and unfinished build, even of this
            very source.
        progress: called on each rank with the numbers of its samples that are done and that it has to do.

    Returns:
        The index: "format_version", "image_format", "num_samples", "bytes", "shards" (each "name",
        "num_samples", "bytes", "sha256"), "totals" (task, split and label -> counts, at most 100 labels and
        "others"), "left_out" (reason -> "count" and "first"), "duplicates" ("count", "first" pairs of keys).

    Raises:
        SampleError: a bad sample, with ``on_error="raise"``.
        ValueError: a source without samples, keys that occur twice, too many bad samples, or a folder that holds
            something else.
        OSError: the folder cannot be written, or a process was killed.
    """
    plan, folder, done = _prepare(drafts, out_dir, options, ranks, overwrite)
    if done is not None:
        return done
    try:
        return _build(plan, folder, num_processes, ranks, progress)
    except RanksError:
        raise
    except SampleError as error:
        raise SampleError(error.shard, error.key, error.reason, f"{error.detail}; repair it, or leave such samples "
                          f"out with on_error='skip' (--on-error skip){folder.leave(ranks.size)}") from error
    except OSError as error:
        raise OSError(f"{error}{folder.leave(ranks.size)}") from error
    except ValueError as error:
        raise ValueError(f"{error}{folder.leave(ranks.size)}") from error


def _prepare(drafts: Iterable[Draft], out_dir: str, options: BuildOptions, ranks: Ranks,
             overwrite: bool) -> tuple[Plan, BuildFolder, dict[str, Any] | None]:
    """Plan, open the folder and agree on both, so that a mistake in the source is told by all ranks at once."""
    plan = folder = done = error = None
    try:
        plan = make_plan(drafts, options)
    except (ValueError, OSError) as caught:
        error = caught
    ranks.agree(error)
    seen = ranks.gather(plan.fingerprint)
    try:
        if seen is not None:
            if len(set(seen)) > 1:
                raise ValueError("the ranks read different drafts from the same source; do all see the same files?")
            folder = BuildFolder(out_dir, plan.summary())
            done = folder.open(overwrite)
    except (ValueError, OSError) as caught:
        error = caught
    ranks.agree(error)
    return plan, folder or BuildFolder(out_dir, plan.summary()), ranks.broadcast(done)


def _build(plan: Plan, folder: BuildFolder, num_processes: int, ranks: Ranks,
           progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Leave duplicates out, build this rank's shards, and let rank 0 publish all of them."""
    _drop_duplicates(plan, num_processes, ranks)
    jobs = [ShardJob(number, units, plan.options, folder.unfinished, plan.fingerprint)
            for number, units in enumerate(plan.shards) if number % ranks.size == ranks.rank and units]
    total = sum(len(job.units) for job in jobs)
    entries, bad = [], []
    for entry in run_jobs(build_shard, jobs, num_processes, lambda count: progress(count, total)):
        entries.append(entry)
        bad += entry["left_out"]
        check_skipped(bad, plan.options)
    gathered = ranks.gather(entries)
    if gathered is None:
        return ranks.broadcast(None)
    entries = sorted((entry for part in gathered for entry in part), key=lambda entry: entry["number"])
    left_out = plan.left_out + [row for entry in entries for row in entry["left_out"]]
    check_skipped([row for row in left_out if row["reason"] not in (UNFIT, DUPLICATE)], plan.options)
    entries = [entry for entry in entries if entry["num_samples"]]
    if not entries:
        raise ValueError(f"no sample to write: all {len(left_out)} were left out, the first is {left_out[0]}")
    index = _index(plan, entries, left_out)
    folder.publish(index, [entry["number"] for entry in entries], left_out)
    return ranks.broadcast(index)


def _drop_duplicates(plan: Plan, num_processes: int, ranks: Ranks) -> None:
    found, error = _find_duplicates(plan, num_processes, ranks), None
    try:
        drop(plan, found)
    except ValueError as caught:
        error = caught
    ranks.agree(error)


def _find_duplicates(plan: Plan, num_processes: int, ranks: Ranks) -> list[tuple[Draft, Draft]]:
    """Pairs of drafts that are the same, on every rank; ranks and processes share the pictures to be read."""
    drafts = {unit.draft.key: unit.draft for units in plan.shards for unit in units}
    groups = candidates(drafts.values())
    own = sources_to_hash(groups)[ranks.rank::ranks.size]
    hashed = [pair for part in run_jobs(hash_sources, own, num_processes) for pair in part]
    gathered = ranks.gather(hashed)
    hashes = ranks.broadcast(None if gathered is None else dict(pair for part in gathered for pair in part))
    return pairs(groups, hashes)


def _index(plan: Plan, entries: list[dict[str, Any]], left_out: list[dict[str, str]]) -> dict[str, Any]:
    totals: dict[str, Counter] = {}
    for entry in entries:
        for kind, counts in entry["totals"].items():
            totals.setdefault(kind, Counter()).update(counts)
    reasons: dict[str, dict[str, Any]] = {}
    for row in left_out:
        told = reasons.setdefault(row["reason"], {"count": 0, "first": []})
        told["count"] += 1
        if len(told["first"]) < _NUM_FIRST:
            told["first"].append({name: row[name] for name in ("key", "where", "detail")})
    shards = [{"name": f"{plan.options.prefix}-{place:06d}.tar",
               **{name: entry[name] for name in ("num_samples", "bytes", "sha256")}}
              for place, entry in enumerate(entries)]
    return {"format_version": FORMAT_VERSION, "image_format": plan.options.image_format,
            "num_samples": sum(entry["num_samples"] for entry in entries),
            "bytes": sum(entry["bytes"] for entry in entries), "shards": shards,
            "totals": {kind: _most_frequent(counts) for kind, counts in totals.items()},
            "left_out": dict(sorted(reasons.items())),
            "duplicates": {"count": len(plan.duplicates), "first": [list(p) for p in plan.duplicates[:_NUM_FIRST]]}}


def _most_frequent(counts: Counter) -> dict[str, int]:
    """Counts in a fixed order, the rarest beyond 100 names summed up as "others"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ordered[_NUM_LABELS:])
    return dict(ordered[:_NUM_LABELS]) | ({"others": others} if others else {})
