"""Convert a Hugging Face directory to a megavg checkpoint or back, and prove that the two are one model.

    python tools/convert_checkpoint.py runs/demo runs/demo-hf
    python tools/convert_checkpoint.py runs/demo/checkpoints/step-000100 runs/step-100-hf --dtype bfloat16 --workers 4
    python tools/convert_checkpoint.py runs/tiny runs/tiny-megavg

SOURCE is a Hugging Face directory, a checkpoint of a run (step-000100), or a run's folder, whose newest checkpoint is
taken. The result is read again and compared, first every tensor bit for bit, then the logits that transformers and
megavg compute in fp32 on the CPU, where the memory suffices. Exit status: 0 all well, 1 OUT differs from SOURCE (it
is kept as OUT.failed), 2 wrong arguments, a damaged SOURCE, or OUT cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from megavg.models.tiny_config import FAMILIES
from megavg.trainer.entry import part

DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PROGRESS_SECONDS = 5.0
_SPARE = 50 * 10**6  # bytes on the disk for all that is no weight


def read_size(text: str) -> int:
    """Bytes of a size such as 5GB or 512MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 5GB, 512MiB or 1000000")
    return max(1, int(float(found[1]) * _UNITS[found[2].upper()]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the folder to convert; it is only read")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=["hf", "megavg"], help="the kind of OUT (default: the one that SOURCE is not)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: what the run computed in, when a "
                        "trained checkpoint becomes a Hugging Face directory; else as they are stored)")
    parser.add_argument("--max-shard-size", type=read_size, default="5GB", metavar="SIZE",
                        help="of a safetensors file (default: 5GB)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that write safetensors files, "
                        "and compare; the result is the same (default: 1)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="write only: do not look at "
                        "SOURCE's checksums, read OUT again or compare logits")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already at OUT")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    return args


def find_source(path: Path) -> Path:
    """The checkpoint that is meant by ``path``: itself, or the newest of a run."""
    from megavg.checkpoint.saved import is_saved
    from megavg.checkpoint.train_state import checkpoints

    if not path.is_dir():
        raise ValueError(f"SOURCE {path} is no folder; name a Hugging Face directory, a checkpoint of a run, or a "
                         "run's output folder")
    if is_saved(path) or (path / "config.json").is_file():
        return path
    there = checkpoints(path / "checkpoints") or checkpoints(path)
    if not there:
        raise ValueError(f"SOURCE {path} is no checkpoint: it holds no config.json, no manifest.json, and no "
                         "checkpoints/step-* that is whole")
    return there[-1]


def check_family(config: Path) -> None:
    """Refuse another family's model before the libraries are loaded."""
    try:
        family = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is damaged ({error}); copy the checkpoint again") from error
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r} in {config} is no family of megavg; it has {', '.join(FAMILIES)}")


def failed_place(out: Path) -> Path:
    """Where a result is kept that differs from SOURCE."""
    return out.with_name(out.name + ".failed")


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse to replace what is not to be replaced: at OUT, and where it is kept if it should differ from SOURCE."""
    there = source.resolve()
    for name, place in (("OUT", out), ("OUT.failed", failed_place(out))):
        here = place.resolve()
        if here == there or here in there.parents:
            raise ValueError(f"{name} {place} is or holds SOURCE {source}; name another folder as OUT")
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            continue
        if not overwrite:
            raise ValueError(f"{name} {place} exists; name another folder as OUT, or give --overwrite")
        if not any((place / file).is_file() for file in ("config.json", "manifest.json")):
            raise ValueError(f"{name} {place} is no checkpoint, so --overwrite does not replace it; name another "
                             "folder as OUT")


def choose_dtype(args: argparse.Namespace, manifest: dict | None) -> str | None:
    """The dtype to cast to; None leaves the tensors as they are stored."""
    from megavg.checkpoint.convert import computed_in

    return args.dtype or (computed_in(manifest) if args.to == "hf" else None)


def choose_names(model: Any, source: Any) -> list[str]:
    """The tensors that the model is made of; those beside them must be ones that carry nothing."""
    import torch

    model.check_weights()
    names = sorted(model.weight_map(1).hf_names)
    for name in sorted(set(source.names) - set(names)):
        is_copy = name == "lm_head.weight" and model.dims.tie_embeddings and torch.equal(
            source.read(name), source.read("model.language_model.embed_tokens.weight"))
        if not is_copy and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{source.folder} holds tensor {name}, which a {model.spec.family} model with its "
                             "config.json has no place for; is it quantised, or of another model?")
        _say(f"{name} is left out: " + ("a copy of the tied embedding" if is_copy else "it is computed, not learnt"))
    return names


def make(args: argparse.Namespace, source: Any, partial: Path) -> tuple[list[str], str]:
    """Write the folder; returns the names of its tensors and a line that tells what it is."""
    from megavg.checkpoint import swap
    from megavg.checkpoint.convert import do_file, finish_hf, plan_files, write_saved
    from megavg.models.base import load_model

    model = load_model(source.folder)
    names = choose_names(model, source)
    jobs = plan_files(source, names, partial, args.max_shard_size)
    total = sum(job.num_bytes for job in jobs)
    _check_room(partial.parent, total)
    about = {"family": model.spec.family, "box_format": model.spec.box_format}
    try:
        swap.begin(args.out)
        if args.to == "hf":
            _run(do_file, jobs, args.workers, "written", total)
            finish_hf(partial, jobs, source)
        else:
            write_saved(partial, source, names, about, _progress("written", total))
    except OSError as error:
        raise ValueError(f"OUT {args.out} cannot be written ({error}); make room, mend the folder's permissions, or "
                         "name one on another disk") from error
    kind = f"Hugging Face directory, {len(jobs)} file{'s' if len(jobs) > 1 else ''}" if args.to == "hf" else \
        "megavg checkpoint of step 0"
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for job in jobs for entry in job.entries})
    return names, (f"{args.out}: {kind}; {model.spec.family}, {len(names)} tensors, {total / 1e9:.3f} GB in "
                   f"{' and '.join(dtypes)}, from {source.folder}")


def _check_room(folder: Path, needed: int) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise ValueError(f"OUT needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {folder}; make room, "
                         "or name a folder on another disk")


def verify(args: argparse.Namespace, source: Any, names: list[str], partial: Path) -> list[str]:
    """Compare what was written with SOURCE; prints what was proven, returns a line for everything that is wrong."""
    from megavg.checkpoint.convert import Source
    from megavg.checkpoint.convert_check import CompareJob, do_compare, structure
    from tools.convert_proof import TOLERANCE, logits_differ, why_not

    wrong = structure(partial, source, names)
    shares = [tuple(names[i::args.workers]) for i in range(args.workers)]
    jobs = [CompareJob(source.folder, source.dtype, partial, share) for share in shares if share]
    total = sum(_num_bytes(source, name) for name in names)
    if not wrong:  # else it may not even open
        wrong += [line for lines in _run(do_compare, jobs, args.workers, "compared", total) for line in lines]
    if wrong:
        return wrong
    print(f"weights: all {len(names)} tensors are bit for bit those of SOURCE"
          + (f", rounded to {str(source.dtype).removeprefix('torch.')}" if source.dtype else ""))
    out = Source(partial)
    reason = why_not(source, out)
    if reason:
        print(f"logits: not compared: {reason}")
        return []
    try:
        difference, largest = logits_differ(source, out)
    except ValueError as error:
        return [str(error)]
    is_well = difference <= TOLERANCE * largest
    text = (f"transformers and megavg differ by at most {difference:.2g} where the largest is {largest:.3g} (fp32, "
            "CPU, one drawn scene)")
    if is_well:
        print(f"logits: {text}")
    return [] if is_well else [f"the logits of {text}"]


def _num_bytes(source: Any, name: str) -> int:
    import math

    shape, dtype = source.facts(name)
    return math.prod(shape) * dtype.itemsize


def check_source(source: Any, workers: int) -> None:
    """Refuse a checkpoint of a run whose files are not as they were written."""
    from megavg.checkpoint.convert_check import FilesJob, do_checksums

    sizes = {name: fact["bytes"] for name, fact in source.manifest["files"].items()}
    jobs = [FilesJob(source.folder, tuple(sorted(sizes)[i::workers])) for i in range(workers)]
    wrong = [line for lines in _run(do_checksums, jobs, workers, "checked", sum(sizes.values())) for line in lines]
    if wrong:
        raise ValueError(f"{wrong[0]} ({len(wrong)} files in all); take the checkpoint before, or copy it again")


def _run(work: Callable, jobs: list, workers: int, done: str, total: int) -> list:
    from megavg.data.builder.pool import run_jobs

    try:
        return list(run_jobs(work, jobs, workers, _progress(done, total)))
    except ChildProcessError as error:
        raise ValueError("a worker was killed, perhaps for want of memory; try again with fewer --workers") from error


def _progress(done: str, total: int) -> Callable[[int], None]:
    """Prints how far it is, every few seconds."""
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            _say(f"  {done}: {count / 1e9:.2f} of {total / 1e9:.2f} GB")

    return show


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def convert(args: argparse.Namespace) -> int:
    """The whole conversion; returns the exit status."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is loaded; the logits are compared on the CPU
    source_folder = find_source(args.source)
    from megavg.checkpoint import swap

    args.out = swap.place_of(args.out)
    check_out(args.out, source_folder, args.overwrite)
    from megavg.checkpoint.convert import Source
    from megavg.parallel.quiet import quieten

    quieten()
    source = Source(source_folder)
    check_family(source.directory / "config.json")
    args.to = args.to or ("megavg" if source.manifest is None else "hf")
    dtype = choose_dtype(args, source.manifest)
    if args.verify and source.manifest is not None:
        check_source(source, args.workers)
    import torch

    source = Source(source_folder, getattr(torch, dtype) if dtype else None)
    partial, failed = swap.beside(args.out), failed_place(args.out)
    try:
        names, summary = make(args, source, partial)
        wrong = verify(args, source, names, partial) if args.verify else []
        if wrong:
            swap.remove(failed)
            os.replace(partial, failed)
        else:
            swap.finish(args.out)
    finally:
        swap.remove(partial)
    for line in wrong[:20]:
        print(f"WRONG: {line}".replace(str(partial), str(failed)))
    if wrong:
        _say(f"convert_checkpoint: {len(wrong)} things are wrong with what was written; it is kept as {failed}")
        return 1
    print(summary)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        return convert(args)
    except (ValueError, OSError, shutil.Error) as error:
        _say(f"convert_checkpoint: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(part(main()))
