"""Measure the vocabulary op against other ways to get log-probs and entropies: time, memory, collectives.

All methods take turns in one process; each figure is the minimum over the turns. Memory is measured in a process of
its own per method: the peak above the inputs, and what of it is beyond the gradients. Prints a table and ratios;
--json writes all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SHAPES = {  # tokens, width, vocabulary
    "cpu": (2048, 1024, 151936),
    "quick": (256, 256, 32000),
    "cuda": (16384, 3584, 152064),
}
PEAKED = ("ours", "ours, tau 1e-5")
GRADIENTS_ONLY = ("ours, cached", "ours, tau 1e-5")  # their forward is that of "ours"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, two turns: under a minute")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, help="N (default 2048 on a CPU, 16384 on a GPU, 256 with --quick)")
    parser.add_argument("--width", type=int, help="D (default 1024, 3584, 256)")
    parser.add_argument("--vocab", type=int, help="V (default 151936, 152064, 32000)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repeats", type=int, help="turns of every method (default 5; 2 with --quick)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--methods", nargs="*", help="only these (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--measure-memory", metavar="METHOD", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    shape = SHAPES["quick" if arguments.quick else arguments.device]
    for name, default in zip(("tokens", "width", "vocab"), shape):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    arguments.dtype = arguments.dtype or {"cpu": "float32", "cuda": "bfloat16"}[arguments.device]
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    return arguments


def problem_of(arguments, peaked: bool = False):
    """The inputs, on their device."""
    import torch

    from tools.vocab_head_methods import make_problem

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_vocab_head: --device cuda, but torch sees no GPU here")
    torch.set_num_threads(arguments.threads or os.cpu_count())
    return make_problem(arguments.tokens, arguments.width, arguments.vocab, getattr(torch, arguments.dtype),
                        arguments.device, peaked)


def timed(function, device: str) -> float:
    """Seconds of one call, its GPU work included."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_times(arguments, methods: dict) -> dict:
    """{method: {"forward": [seconds of each turn], "both": [...]}}, and "peaked" for those measured on peaked rows."""
    plain = problem_of(arguments)
    peaked = problem_of(arguments, peaked=True) if set(PEAKED) <= set(methods) else None
    runs = {name: method(plain) for name, method in methods.items()}
    peaked_runs = {name: methods[name](peaked) for name in PEAKED} if peaked is not None else {}
    times = {name: {"forward": [], "both": [], "peaked": []} for name in methods}

    def measure(name: str, key: str, function) -> None:
        times[name][key].append(timed(function, arguments.device))
        print(f"  {name}, {key}: {times[name][key][-1]:.3f} s", file=sys.stderr, flush=True)

    for turn in range(arguments.repeats):
        print(f"turn {turn + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
        for name, run in runs.items():
            if name not in GRADIENTS_ONLY:
                measure(name, "forward", run.forward)
            measure(name, "both", run.both)
        for name, run in peaked_runs.items():
            measure(name, "peaked", run.both)
    return {name: {key: value for key, value in found.items() if value} for name, found in times.items()}


def peaks_above_inputs(method: str, arguments) -> dict[str, float]:
    """Peak MB above the inputs of a forward and of both passes, in this process."""
    import torch

    from tools.vocab_head_methods import Problem, methods_for

    methods, problem = methods_for(arguments.device), problem_of(arguments)
    small = Problem(problem.hidden[:8], problem.weight[:2048], problem.targets[:8] % 2048,
                    problem.upstream_logprob[:8], problem.upstream_entropy[:8])
    methods[method](small).both()  # libraries are loaded and their own buffers there
    torch.mm(problem.hidden[:512], problem.weight[:1024].t())
    run = methods[method](problem)
    return {which: _peak_of(getattr(run, which), arguments.device) for which in ("forward", "both")}


def _peak_of(call, device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()  # noqa: F841  its results are part of the peak
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with open("/proc/self/clear_refs", "w") as file:  # the high-water mark starts again from here
        file.write("5")
    before = _status_kb("VmRSS")
    kept = call()  # noqa: F841  its results are part of the peak
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def measure_memory(arguments, name: str) -> dict[str, float]:
    """``peaks_above_inputs`` in a fresh process that gives freed memory back at once."""
    command = [sys.executable, os.path.abspath(__file__), "--measure-memory", name, "--device", arguments.device,
               "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    for option in ("tokens", "width", "vocab"):
        command += [f"--{option}", str(getattr(arguments, option))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                   "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_vocab_head: measuring the memory of {name!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def count_collectives() -> dict[str, list[str]]:
    """Collectives of one forward and one backward of the op on 2 gloo ranks, by name."""
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_collectives_of_a_rank, args=(queue, os.path.join(folder, "store")), nprocs=2)
    return queue.get()


def _collectives_of_a_rank(rank: int, queue, store: str) -> None:
    import torch
    import torch.distributed as dist

    from megavg.ops import VocabShard, token_scores

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    called: list[str] = []

    def watch(name):
        original = getattr(dist, name)

        def wrapper(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, wrapper)

    for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "broadcast", "all_to_all_single",
                 "all_gather", "reduce", "gather", "scatter", "barrier"):
        watch(name)
    torch.manual_seed(0)
    hidden = torch.randn(700, 16, requires_grad=True)
    weight = torch.randn(3000, 16, requires_grad=True)
    scores = token_scores(hidden, weight, torch.arange(700), VocabShard(3000 * rank, 3000 * rank + 3000, 6000,
                                                                        dist.group.WORLD))
    forward = list(called)
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    if rank == 0:
        queue.put({"forward": forward, "backward": called[len(forward):]})
    dist.destroy_process_group()


def ratios_of(best: dict) -> dict[str, float]:
    """The ratios of minima that the project promises; those whose methods were not run are left out."""
    floor = {"forward": min((best[n]["forward"] for n in best if n.startswith("products")), default=None),
             "both": min((best[n]["both"] for n in best if n.startswith("products")), default=None)}
    chunks = [best[n]["forward"] for n in ("token chunks", "gradient in forward") if n in best]
    pairs = {
        "forward_vs_gemm": (_get(best, "ours", "forward"), floor["forward"]),
        "forward_vs_dense": (_get(best, "ours", "forward"), _get(best, "dense", "forward")),
        "forward_vs_chunks": (_get(best, "ours", "forward"), min(chunks, default=None)),
        "both_vs_3gemm": (_get(best, "ours", "both"), floor["both"]),
        "both_vs_dense": (_get(best, "ours", "both"), _get(best, "dense", "both")),
        "cached_vs_3gemm": (_get(best, "ours, cached", "both"), floor["both"]),
        "cached_vs_chunks": (_get(best, "ours, cached", "both"), _get(best, "gradient in forward", "both")),
        "tau_vs_exact": (_get(best, "ours, tau 1e-5", "peaked"), _get(best, "ours", "peaked")),
    }
    return {name: a / b for name, (a, b) in pairs.items() if a and b}


def _get(best: dict, method: str, key: str) -> float | None:
    return best.get(method, {}).get(key)


def about_peaked_rows(arguments) -> dict[str, float]:
    """How peaked the peaked rows are: mean and median entropy, and the probability that tau = 1e-5 leaves out."""
    from megavg.ops import HeadOptions, VocabShard, token_scores

    problem = problem_of(arguments, peaked=True)
    scores = token_scores(problem.hidden.requires_grad_(), problem.weight, problem.targets,
                          VocabShard.whole(arguments.vocab), options=HeadOptions(skip_mass=1e-5))
    entropy = scores.entropy.detach()
    return {"mean_entropy": float(entropy.mean()), "median_entropy": float(entropy.median()),
            "mean_dropped_mass": float(scores.dropped_mass.mean())}


def machine(arguments) -> str:
    """What this ran on."""
    import platform

    import torch

    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    from tools.vocab_head_methods import methods_for

    methods = methods_for(arguments.device)
    if arguments.measure_memory:
        print(json.dumps(peaks_above_inputs(arguments.measure_memory, arguments)))
        return 0
    wanted = arguments.methods or list(methods)
    unknown = [name for name in wanted if name not in methods]
    if unknown:
        sys.exit(f"bench_vocab_head: unknown method {unknown[0]!r}; there are {', '.join(methods)}")
    report = measure(arguments, {name: methods[name] for name in wanted})
    print_report(report)
    if arguments.json:
        partial = arguments.json + ".tmp"
        with open(partial, "w") as file:
            json.dump(report, file, indent=1)
        os.replace(partial, arguments.json)
    return 0


def measure(arguments, methods: dict) -> dict:
    """Every figure of a run."""
    times = measure_times(arguments, methods)
    best = {name: {key: min(values) for key, values in found.items()} for name, found in times.items()}
    gradients = (arguments.tokens + arguments.vocab) * arguments.width * {"float32": 4, "bfloat16": 2}[arguments.dtype]
    memory = {}
    for name in methods:
        if not name.startswith("products"):
            print(f"memory of {name}", file=sys.stderr, flush=True)
            memory[name] = measure_memory(arguments, name)
            memory[name]["beyond_gradients"] = memory[name]["both"] - gradients / 1e6
    report = {
        "machine": machine(arguments),
        "shape": {"tokens": arguments.tokens, "width": arguments.width, "vocab": arguments.vocab},
        "dtype": arguments.dtype, "ratios": ratios_of(best),
        "seconds": best, "all_seconds": times, "peak_mb": memory, "collective_calls": count_collectives(),
        "peaked_rows": about_peaked_rows(arguments),
    }
    report["collectives"] = {key: len(names) for key, names in report["collective_calls"].items()}
    if "ours" in memory:
        report["transient_mb"] = {"forward": memory["ours"]["forward"], "both": memory["ours"]["beyond_gradients"]}
    return report


def print_report(report: dict) -> None:
    shape = report["shape"]
    print(f"\n{report['machine']}\nN = {shape['tokens']}, D = {shape['width']}, V = {shape['vocab']}, "
          f"{report['dtype']}; minima of {len(next(iter(report['all_seconds'].values()))['both'])} interleaved turns\n")
    print(f"{'method':32s}{'forward s':>11s}{'both s':>9s}{'forward MB':>12s}{'both MB':>9s}{'less gradients':>16s}")
    for name, seconds in report["seconds"].items():
        memory = report["peak_mb"].get(name, {})
        cells = [(seconds.get("forward"), 11, 3), (seconds["both"], 9, 3), (memory.get("forward"), 12, 0),
                 (memory.get("both"), 9, 0), (memory.get("beyond_gradients"), 16, 0)]
        print(f"{name:32s}" + "".join(f"{'' if x is None else f'{x:.{digits}f}':>{width}s}"
                                      for x, width, digits in cells))
    print("\nratios of minima: " + ", ".join(f"{name} {value:.2f}" for name, value in report["ratios"].items()))
    print("collectives of the op at TP2: " + "; ".join(f"{key}: {', '.join(names)}" for key, names in
                                                     report["collective_calls"].items()))
    print(f"peaked rows: entropy {report['peaked_rows']['mean_entropy']:.2f} (mean), "
          f"{report['peaked_rows']['median_entropy']:.2f} (median) nats; tau leaves out "
          f"{report['peaked_rows']['mean_dropped_mass']:.1e} of the probability")


if __name__ == "__main__":
    sys.exit(main())
