"""Write a study's report: a table, a row for each run as CSV, curves, and the outcome beside each paper's claim."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from tools.study_chart import Panel, chart
from tools.study_plan import FIGURES, Claim, Study, mark_of, plan
from tools.study_runs import FAILURE, read_result

MIN_PAIRS = 3
CONFIRMED, NOT_SEEN, CONTRADICTED = "confirmed", "not seen", "contradicted"
TOO_FEW, NOT_RUN = "too few pairs", "not run"


@dataclass
class Results:
    """What there is of a study: result by task name, and the tasks that failed, are missing, or were changed since."""

    done: dict[str, dict]
    failed: dict[str, str]
    missing: list[str]
    changed: list[str]
    warmups: dict[str, dict]

    def final(self, method: str, noise: float) -> dict[int, dict[str, float]]:
        """Final figures by seed."""
        return {r["seed"]: r["final"] for r in self.done.values() if (r["method"], r["noise"]) == (method, noise)}

    def runs(self, method: str, noise: float) -> list[dict]:
        return [r for r in self.done.values() if (r["method"], r["noise"]) == (method, noise)]


def read_results(study: Study, out: Path) -> Results:
    """The results of a study's folder; those of another configuration than the study's are named and left out."""
    import json

    results = Results({}, {}, [], [], {})
    for task in plan(study):
        found = read_result(out / task.name)
        if found is not None and found["key"] == task.key:
            (results.warmups if task.kind == "warmup" else results.done)[task.name] = found
        elif found is not None:
            results.changed.append(task.name)
        elif (out / task.name / FAILURE).is_file():
            results.failed[task.name] = json.loads((out / task.name / FAILURE).read_text())["error"]
        elif task.kind == "run":
            results.missing.append(task.name)
    return results


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / sqrt(n) with the unbiased s; the error is None for fewer than two values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def verdict(differences: list[float]) -> str:
    """Of the paired differences (higher side - lower side): at least MIN_PAIRS, and a mean beyond 2 standard errors."""
    if len(differences) < MIN_PAIRS:
        return TOO_FEW if differences else NOT_RUN
    mean, error = mean_and_error(differences)
    if abs(mean) <= 2 * error:
        return NOT_SEEN
    return CONFIRMED if mean > 0 else CONTRADICTED


def differences(results: Results, study: Study, claim: Claim) -> dict[float, list[float]]:
    """Noise level -> differences of the claim's metric, paired by seed."""
    noises = [noise for noise in study.noises if not claim.noises or noise in claim.noises]
    found = {}
    for noise in noises:
        if noise == claim.lower_noise:
            continue
        sides = [_side(results, claim.higher, claim.metric, noise),
                 _side(results, claim.lower, claim.metric, noise if claim.lower_noise is None else claim.lower_noise)]
        seeds = [seed for seed in study.seeds if all(side is None or seed in side for side in sides)]
        values = [[side[seed] if side is not None else float(end) for seed in seeds]
                  for side, end in zip(sides, (claim.higher, claim.lower))]
        if seeds:
            found[noise] = [high - low for high, low in zip(*values)]
    return found


def _side(results: Results, side: float | str, metric: str, noise: float) -> dict[int, float] | None:
    """A method's figure by seed; None for a side that is a number."""
    if not isinstance(side, str):
        return None
    return {seed: final[metric] for seed, final in results.final(side, noise).items() if metric in final}


def plus_minus(values: list[float], digits: int = 3, sign: bool = False) -> str:
    """"mean ± error", or the mean alone."""
    mean, error = mean_and_error(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def write_report(study: Study, out: Path, folder: Path, facts: dict) -> Results:
    """Write results.csv, the charts and index.md into ``folder``.

    Args:
        facts: what the results do not say: ``command``, ``workers`` and ``device``.
    """
    results = read_results(study, out)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(study, results, folder / "results.csv")
    pictures = []
    for one in study.charts:
        picture = _curves(study, results, one.title, [name for name in one.methods if name in study.chosen])
        if picture:
            (folder / f"curves_{one.name}.svg").write_text(picture)
            pictures.append((one.title, f"curves_{one.name}.svg"))
    (folder / "index.md").write_text("\n".join([
        *_head(study, results, facts), *_tables(study, results), *_claims(study, results),
        *_pictures(pictures), *_methods(study), *_absent(results)]) + "\n")
    return results


def _write_csv(study: Study, results: Results, path: Path) -> None:
    columns = ["method", "noise", "seed", *FIGURES, "parse_rate", "reward", "seconds"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for task in plan(study):
            if task.name in results.done:
                row = results.done[task.name]
                row = {**row, **row["final"]}
                writer.writerow([f"{row[c]:.6g}" if isinstance(row.get(c), float) else row.get(c, "") for c in columns])


def _head(study: Study, results: Results, facts: dict) -> list[str]:
    total = sum(task.kind == "run" for task in plan(study))
    parameters = {warmup["num_parameters"] for warmup in results.warmups.values()}
    size = f"{parameters.pop() / 1e6:.1f} million parameters" if parameters else "unknown size"
    starts = ", ".join(f"seed {w['seed']}: {w['final'].get('acc_at_50', 0):.3f} after {len(w['curves']['loss'])} steps"
                       for w in results.warmups.values())
    rollout = study.run.get("rollout", {})
    steps = (f"{study.run['trainer']['num_steps']} steps of {study.run['data']['prompts_per_step']} prompts with "
             f"{rollout.get('group_size', 8)} answers each")
    work = sum(r["seconds"] for r in [*results.done.values(), *results.warmups.values()])
    return [
        "# Which entropy control helps: a study on drawn scenes", "",
        f"**{len(results.done)} of {total} runs are done**" + (f", {len(results.failed)} trainings failed"
                                                              if results.failed else "") + ".", "",
        f"A tiny model of {size} ({study.checkpoint.get('family')}, random weights, warmed up by supervised "
        f"fine-tuning) finds coloured shapes in drawn scenes of {study.data.scenes.get('size', 96)} pixels: nothing "
        "here says what a released model does on real data. What it can show is whether a method moves entropy and "
        "accuracy in the direction that its paper says, under otherwise equal conditions.", "",
        f"- Each run: {steps}, from its seed's warm-up. Noise is the share of training labels that were replaced by a "
        "box elsewhere; warm-ups and evaluations have clean labels.",
        f"- Seeds: {', '.join(map(str, study.seeds))}; each has its own starting weights, warm-up, order and sampling. "
        f"The warm-ups' validation Acc@0.5: {starts or 'none is done'}.",
        f"- Evaluation: greedy, {study.data.held_out} held-out scenes, the same for every run.",
        f"- Made by `{facts['command']}` on {facts['device']} with {facts['workers']} trainings at a time: "
        f"{work / 60:.0f} minutes of training and evaluation in all.", ""]


def _tables(study: Study, results: Results) -> list[str]:
    """For each noise level a row for each method."""
    lines = ["## Figures", "", "Mean ± standard error over seeds; n is their number. The last three columns are "
             f"paired differences to {study.baseline} by seed. Entropy is of the answers that are trained on: sampled "
             "ones, but written ones under supervised fine-tuning (sft), whose entropy is not comparable.", ""]
    for noise in study.noises:
        base = results.final(study.baseline, noise)
        rows = []
        for name in study.chosen:
            final = results.final(name, noise)
            if not final:
                continue
            cells = [plus_minus([f[metric] for f in final.values()]) for metric in ("acc_at_50", "mean_iou", "entropy")]
            for metric in ("acc_at_50", "mean_iou", "entropy"):
                pairs = [final[seed][metric] - base[seed][metric] for seed in final if seed in base]
                cells.append(plus_minus(pairs, sign=True) if pairs and name != study.baseline else "")
            rows.append(f"| {name} | {len(final)} | " + " | ".join(cells) + " |")
        if rows:
            lines += [f"### {noise:.0%} of the labels are wrong".replace("%", " %"), "",
                      "| method | n | Acc@0.5 | mean IoU | final entropy | Acc@0.5 - baseline | mean IoU - baseline | "
                      "entropy - baseline |", "|---|---|---|---|---|---|---|---|", *rows, ""]
    return lines


def _claims(study: Study, results: Results) -> list[str]:
    lines = [
        "## The papers' claims at this scale", "",
        f"Rule: over the pairs (seed x noise level), a mean difference beyond 2 standard errors, with at least "
        f"{MIN_PAIRS} pairs, is *{CONFIRMED}* when it has the claimed sign and *{CONTRADICTED}* when it has the other; "
        f"everything else is *{NOT_SEEN}*; *{TOO_FEW}* and *{NOT_RUN}* are no verdict. All outcomes are kept. "
        "Pairs of one seed share a warm-up and are not fully "
        f"independent, 2 standard errors of 3 pairs are a weak bar, and of {len(study.claims)} comparisons some pass "
        "by chance.", "",
        "| claim | paper | compared | figure | difference | pairs | by noise level | verdict |",
        "|---|---|---|---|---|---|---|---|"]
    for claim in study.claims:
        found = differences(results, study, claim)
        pairs = [value for values in found.values() for value in values]
        higher, lower = _named(study, claim.higher), _named(study, claim.lower)
        lower += "" if claim.lower_noise is None else f" at {claim.lower_noise:.0%}"
        detail = "; ".join(f"{noise:.0%}: {plus_minus(values, sign=True)}" for noise, values in found.items())
        lines.append(f"| {claim.text} | {claim.source} | {higher} - {lower} | {FIGURES[claim.metric]} | "
                     f"{plus_minus(pairs, sign=True) if pairs else ''} | {len(pairs)} | {detail} | "
                     f"**{verdict(pairs)}** |")
    return [*lines, ""]


def _named(study: Study, side: float | str) -> str:
    return f"{side} {mark_of(study, side)}" if isinstance(side, str) else f"{side:g}"


def _pictures(pictures: list[tuple[str, str]]) -> list[str]:
    lines = ["## Curves", "", "Means over the seeds at which every method of a panel is done.", ""] if pictures else []
    for title, name in pictures:
        lines += [f"![{title}]({name})", ""]
    return lines


def _methods(study: Study) -> list[str]:
    rows = [f"| {name} | {mark_of(study, name)} | {study.methods[name].text} | "
            + ", ".join(f"{noise:.0%}" for noise in study.noises_of(name)) + " | "
            + ", ".join(f"`{key}={value}`" for key, value in study.methods[name].overrides.items()) + " |"
            for name in study.chosen]
    return ["## Methods", "",
            "[exact]: read from the authors' released code or formulas. [reported]: as reported by readers of the "
            "paper. [ours]: no code was available, the definition is this project's own in the paper's spirit, and not "
            "a reproduction: its verdict says nothing against the paper.", "",
            "Not every method is run at every level of noise, which keeps the study short.", "",
            "| method | source | what | wrong labels | options |", "|---|---|---|---|---|", *rows, ""]


def _absent(results: Results) -> list[str]:
    lines = []
    if results.failed:
        lines += ["## Failed trainings", "", *(f"- {name}: `{error.strip().splitlines()[-1]}`"
                                               for name, error in results.failed.items()), ""]
    if results.changed:
        lines += ["## Left out", "", "Made by another configuration: an option, or the default of one, has changed "
                  f"since. {', '.join(results.changed)}", ""]
    if results.missing:
        lines += ["## Not run yet", "", ", ".join(results.missing), ""]
    return lines


def _curves(study: Study, results: Results, title: str, methods: list[str]) -> str | None:
    """Entropy and accuracy by step; a column for each noise level; None without a run."""
    methods = [name for name in methods if any(results.runs(name, noise) for noise in study.noises)]
    noises = [noise for noise in study.noises if any(results.runs(name, noise) for name in methods)]
    if not noises:
        return None
    rows: list[list[Panel]] = [[], []]
    for noise in noises:
        where = f"{noise:.0%} wrong labels".replace("%", " %")
        entropy, accuracy = Panel(where, "step", "entropy, nats"), Panel(where, "step", "held-out Acc@0.5")
        there = [results.runs(name, noise) for name in methods if results.runs(name, noise)]
        # of the seeds that all have: others start elsewhere, and their means would not compare
        seeds = set.intersection(*({run["seed"] for run in runs} for runs in there)) if there else set()
        for name in methods:
            runs = [run for run in results.runs(name, noise) if run["seed"] in seeds]
            if runs:
                # an SFT's entropy is of written answers, another quantity
                if "reward/mean" in runs[0]["curves"]:
                    entropy.lines[name] = _mean_line([r["curves"]["step"] for r in runs],
                                                     [_smooth(r["curves"]["entropy/mean"]) for r in runs])
                accuracy.lines[name] = _mean_line([r["evaluations"]["step"] for r in runs],
                                                  [r["evaluations"]["acc_at_50"] for r in runs])
        rows[0].append(entropy)
        rows[1].append(accuracy)
    return chart(title, rows, methods)


def _mean_line(steps: list[list[float]], values: list[list[float]]) -> list[tuple[float, float]]:
    """Points of the mean over runs of the same steps."""
    return [(at, sum(column) / len(column)) for at, column in zip(steps[0], zip(*values))]


def _smooth(values: list[float], half: int = 2) -> list[float]:
    """Means over up to 5 neighbours: a step's entropy is of a few prompts."""
    windows = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
