"""tools/report.py makes one page of runs: what it shows is what the runs recorded, and it is safe to open anywhere."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from megavg.data.shards import iterate_all
from megavg.evaluation.figures import figures
from tests.distributed import run_ranks
from tests.tiny_runs import read_metrics, run_tree, train, training_lines
from tools import report
from tools.report_answers import chosen
from tools.report_curves import Line, moving_mean, thin
from tools.report_evaluation import read_stories
from tools.report_run import distinct_names, read_runs, status

HOSTILE = '</pre><script>document.title = "taken"</script>\x00<img src="http://example.com/x" onerror="alert(1)">'
VOID = {"meta", "br", "img", "hr", "input", "link"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")


class Page(HTMLParser):
    """Reads a page, refuses one whose tags are not balanced, and keeps elements, texts and tables."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        """All that can be read, with single blanks."""
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


@pytest.fixture(scope="module")
def run(checkpoints, scene_shards, tmp_path_factory):
    """Folder of a real training of 3 steps with two evaluations of one set and a page of tokens."""
    out = tmp_path_factory.mktemp("report") / "first" / "run"
    shards = scene_shards(16)
    run_ranks(1, train, run_tree(
        checkpoints("qwen3_vl"), shards, out, f"evaluation.sets.scenes=[{shards}]", "evaluation.at_start=true",
        "evaluation.at_end=true", "evaluation.limit=12", "trainer.diagnostics_every=3", "rollout.max_new_tokens=8",
        "rollout.group_size=2"))
    return out


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def make(out: Path, *arguments) -> tuple[str, Page]:
    assert report.main([*map(str, arguments), "--out", str(out)]) == 0
    content = out.read_text(encoding="utf-8")
    return content, Page(content)


def curves(page: Page) -> dict[str, dict[str, tuple[list, list]]]:
    """metric -> run -> (steps, values) as the page's script gets them."""
    numbers = json.loads(next(data for tag, data in page.texts if tag == "script" and data.startswith("{")))
    charts = [attributes["aria-label"].partition(" by step")[0] for attributes in page.all("svg")
              if " by step" in attributes.get("aria-label", "")]
    assert len(charts) == len(numbers["charts"])
    return {metric: {numbers["runs"][line[0]]: (line[1], line[2]) for line in chart["lines"]}
            for metric, chart in zip(charts, numbers["charts"])}


def rewrite_metrics(run: Path, change) -> None:
    """Replace each line of metrics.jsonl by what ``change`` makes of it."""
    lines = [json.dumps(change(dict(line))) for line in read_metrics(run)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def assert_safe(content: str, page: Page) -> None:
    """Nothing is loaded, and the page's own script is the only one."""
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names)) > 5
    assert [a.get("type", "own") for a in page.all("script")] == ["application/json", "own"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "data", "action", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    style = next(data for tag, data in page.texts if tag == "style")
    assert not re.search(r"url\(|@import|https?:", style)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:") and "script-src 'sha256-" in policy


def test_the_curves_are_what_the_run_recorded(run, tmp_path):
    content, page = make(tmp_path / "report.html", run, "--smooth", "1")
    assert_safe(content, page)
    lines, found = training_lines(run), curves(page)
    assert {"loss", "reward/mean", "entropy/mean", "gradient_norm", "tokens_per_second", "time/step"} <= set(found)
    for metric, of in found.items():
        steps, values = of["run"]
        assert steps == [line["step"] for line in lines if metric in line]
        assert values == pytest.approx([line[metric] for line in lines if metric in line], rel=1e-5, abs=1e-30)
    assert found["loss"]["run"][0] == [1, 2, 3]
    never = {name for name, value in lines[0].items() if isinstance(value, (int, float)) and name not in found
             and name != "step" and not name.startswith("time/")}
    assert never  # such as lr
    assert all(name in page.words and len({line[name] for line in lines}) == 1 for name in never)


def test_first_last_and_best_evaluation_are_told(run, tmp_path):
    changed = copy(run, tmp_path / "run")
    stored = json.loads((run / "evaluation" / "scenes-000000.json").read_text())
    for step, share, iou in ((0, 0.25, 0.2), (2, 0.75, 0.6), (3, 0.5, 0.4)):
        result = {**stored, "step": step, "acc_at_50": share, "mean_iou": iou}
        (changed / "evaluation" / f"scenes-{step:06d}.json").write_text(json.dumps(result))
    # only the first and the last are read whole; between them the figures of metrics.jsonl count
    rewrite_metrics(changed, lambda line: {**line, **({"eval/scenes/acc_at_50": 0.75} if line["step"] == 2 else {})})
    _, page = make(tmp_path / "report.html", changed)
    assert "scenes Acc@0.5 0.250 0.500 ▲ +0.250 0.750 (2) +0 −0 0.200 → 0.400 0.000 → 0.000 12" in page.words
    assert "scenes, Acc@0.5 0.500 0.250 at step 0" in page.words
    assert curves(page)["eval/scenes/acc_at_50"]["run"] == ([0, 2, 3], [0.0, 0.75, 0.0])


def test_reasons_times_and_options_are_those_of_the_run(run, tmp_path):
    _, page = make(tmp_path / "report.html", run)
    assert "finished, 3 of 3 steps" in page.words
    assert "ecvgpo [ours]" in page.words and "TP1 x PP1 x DP1, cpu, float32" in page.words
    counts = [line["reasons"] for line in training_lines(run)]
    for name in set().union(*counts):
        reward, _, reason = name.partition(": ")
        own = [sum(n for other, n in count.items() if other.startswith(f"{reward}: ")) for count in counts]
        shares = [f"{100 * count.get(name, 0) / total:.1f}" for count, total in zip(counts, own)]
        assert f"{reason} {' '.join(shares)} {sum(count.get(name, 0) for count in counts)}" in page.words
    mean = sum(line["time/rollout"] for line in training_lines(run)) / 3
    assert f"{mean:.4g} (" in page.words
    assert "rollout.max_new_tokens 8" in page.words
    frames = page.all("iframe")
    assert len(frames) == 1 and "Answers at step 3" in frames[0]["srcdoc"] and frames[0]["sandbox"] is None


def test_pictures_are_those_of_the_shards(run, scene_shards, tmp_path):
    _, page = make(tmp_path / "report.html", run, "--max-answers", "6")
    shown = {base64.b64decode(image["href"].partition(",")[2]) for image in page.all("image")}
    samples = list(iterate_all(str(scene_shards(16))))[:12]
    decoded = {Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in shown}
    assert decoded == {sample.image.convert("RGB").tobytes() for sample in samples}  # of this size without loss
    drawn = {(float(a["x"]), float(a["width"])) for a in page.all("rect") if a["class"] == "true"}
    assert drawn == {(round(x0, 2), round(x1 - x0, 2)) for sample in samples for x0, _, x1, _ in sample.boxes_xyxy_px}


def test_runs_are_laid_over_each_other_and_told_apart(run, tmp_path):
    other = copy(run, tmp_path / "second" / "run")
    rewrite_metrics(other, lambda line: {**line, **({"loss": line["loss"] + 1} if "loss" in line else {})})
    options = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(options.replace("lr: 0.001", "lr: 0.125").replace(str(run), str(other)))
    _, page = make(tmp_path / "two.html", run, other, run, "--title", "A <b> & B")
    assert "2 runs" in page.words and ("h1", "A <b> & B") in page.texts
    loss = curves(page)["loss"]
    assert list(loss) == ["first/run", "second/run"]
    assert loss["second/run"][1] == pytest.approx([value + 1 for value in loss["first/run"][1]], rel=1e-5)
    differing = page.words.partition("What differs")[2].partition("The rest")[0]
    assert differing.split() == ["option", "first/run", "second/run", "optimizer.lr", "0.001", "0.125"]
    assert {"c0", "c1"} <= {name for a in page.all("path") for name in a.get("class", "").split()}


def test_gains_and_losses_between_evaluations_are_found(run, tmp_path):
    changed = copy(run, tmp_path / "run")
    path = changed / "evaluation" / "scenes-000003.json"
    result = json.loads(path.read_text())
    first = json.loads((changed / "evaluation" / "scenes-000000.json").read_text())
    for row in first["rows"] + result["rows"]:
        row.update(correct=False, iou=0.1)
    result["rows"][4].update(correct=True, iou=0.75, predicted_boxes_px=[[1.0, 2.0, 30.5, 40.0]], parsed=True)
    result["rows"][7].update(iou=0.05)
    path.write_text(json.dumps(result))
    (changed / "evaluation" / "scenes-000000.json").write_text(json.dumps(first))
    story, = read_stories(read_runs([str(changed)]))
    assert story.turned() == (1, 0)
    groups = dict(chosen(story, 3))
    gained, lost = groups["Gained most from step 0 to step 3"], groups["Lost most from step 0 to step 3"]
    assert [row["key"] for _, row in gained] == [result["rows"][4]["key"]]
    assert [row["key"] for _, row in lost] == [result["rows"][7]["key"]]
    assert groups["The best at step 3"][0][1]["key"] == gained[0][1]["key"]
    assert groups["The worst at step 3"][0][1]["key"] == lost[0][1]["key"]
    _, page = make(tmp_path / "report.html", changed)
    assert "+1 −0" in page.words and "IoU 0.75" in page.words
    assert {"class": "now", "x": "1.00", "y": "2.00", "width": "29.50", "height": "38.00"} in page.all("rect")


def test_sets_of_several_tasks_and_platforms_are_broken_down(run, tmp_path):
    mixed = copy(run, tmp_path / "run")
    for step, hits in ((0, 1), (3, 3)):
        path = mixed / "evaluation" / f"scenes-00000{step}.json"
        rows = json.loads(path.read_text())["rows"]
        for i, row in enumerate(rows[:4]):
            row.update(task="point", correct=i < hits, center_in_box=i < hits, miss_px=0.0 if i < hits else 12.0,
                       predicted_points_px=[[10.0, 20.0]], parsed=True, meta={"platform": "web" if i % 2 else "ios"})
        rows[4].update(task="classification", true_labels=["cat"], predicted_class="dog", true_boxes_px=[])
        path.write_text(json.dumps({"set": "scenes", "step": step, **figures(rows), "rows": rows}))
    _, page = make(tmp_path / "report.html", mixed)
    words = page.words
    assert "scenes correct 0.083 0.250 ▲ +0.167 0.250 (3) +2 −0" in words
    assert "By task task figure first last parsed samples" in words and "point point accuracy 0.25 0.75 1 4" in words
    assert "ios point accuracy 0.5 1 1 2 web point accuracy 0 0.5 1 2" in words
    assert "outside" not in words and "12 px off" in words and "it is cat" in words
    assert "no picture for 1 of the answers" in words and "holds other samples than the run read" in words  # no box
    assert {a["class"] for a in page.all("circle") if a["cx"] == "10.00"} == {"halo", "now", "first"}


def test_no_text_of_a_model_or_a_file_becomes_markup(run, tmp_path):
    hostile = copy(run, tmp_path / "run<!--<script>")
    for path in (hostile / "evaluation").glob("*.json"):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            row.update(text=HOSTILE, expression=HOSTILE, reason=HOSTILE, meta={"platform": HOSTILE + row["key"]})
        path.write_text(json.dumps(result))
        path.rename(path.with_name(path.name.replace("scenes", "<b>scenes")))
    rewrite_metrics(hostile, lambda line: {**line, HOSTILE: line["step"], "reasons": {f"iou: {HOSTILE}": 1}})
    (hostile / "config.yaml").write_text((hostile / "config.yaml").read_text() + f"extra: {json.dumps(HOSTILE)}\n")
    (hostile / "run.json").write_text(json.dumps({"algorithm": HOSTILE, "family": HOSTILE}))
    (hostile / "prompts.yaml").write_text(f"rec: {json.dumps(HOSTILE)}\n")
    content, page = make(tmp_path / "report.html", hostile)
    assert_safe(content, page)
    shown = HOSTILE.replace("\x00", "\u2400")  # a sign for the character
    assert page.words.count(shown) > 20 and "\x00" not in content
    assert not [data for tag, data in page.texts if tag == "script" and data.startswith("{") and "<" in data]
    assert ("pre", shown) in page.texts and ("h5", shown) in page.texts
    assert shown in " ".join(a.get("aria-label", "") for a in page.all("svg"))


def _torn(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1, "rew')


def _not_finite(run: Path) -> None:
    rewrite_metrics(run, lambda line: {**line, "loss": math.nan} if line["step"] == 2 else line)


def _huge(run: Path) -> None:
    rewrite_metrics(run, lambda line: {**line, "loss": -1.7e308} if line["step"] == 2 else line)


def _old(run: Path) -> None:
    rewrite_metrics(run, lambda line: {name: line[name] for name in ("step", "loss") if name in line})


def _still_going(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("num_steps: 3", "num_steps: 9"))


def _stopped(run: Path) -> None:
    _still_going(run)
    (run / "stopped.json").write_text('{"signal": "SIGTERM", "step": 3}')


def _bare(run: Path) -> None:
    for name in ("config.yaml", "run.json", "prompts.yaml"):
        (run / name).unlink()
    for name in ("evaluation", "heat_maps"):
        shutil.rmtree(run / name)


def _only_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "evaluation")


def _broken_evaluation(run: Path) -> None:
    (run / "evaluation" / "scenes-000003.json").write_text('{"set": "sce')


def _shards_gone(run: Path) -> None:
    for path in (run / "evaluation").glob("*.json"):
        path.write_text(re.sub(r'"shard": "[^"]*"', '"shard": "pipe:touch gone/shard.tar"', path.read_text()))


@pytest.mark.parametrize("damage, words", [
    (_torn, "the last line cannot be read and is left out"), (_not_finite, "gaps in the curves: loss (1)"),
    (_huge, "gaps in the curves: loss (1)"),
    (_old, "No run counted reasons"), (_still_going, "not finished: 3 of 9 steps"),
    (_stopped, "stopped by SIGTERM after 3 of 9 steps"), (_bare, "No evaluation was found"),
    (_only_begun, "No training step was found"),
    (_broken_evaluation, "evaluation/scenes-000003.json cannot be read and is left out"),
    (_shards_gone, "of the answers: pipe:touch gone/shard.tar is not on this machine, or behind a URL"),
], ids=lambda value: value.__name__.strip("_") if callable(value) else "")
def test_what_is_missing_or_broken_is_said(run, tmp_path, damage, words):
    changed = copy(run, tmp_path / "run")
    damage(changed)
    content, page = make(tmp_path / "report.html", changed)
    assert_safe(content, page)
    assert words in page.words
    if damage is not _only_begun:
        assert curves(page)["loss"]["run"][0] == [1, 2, 3]
    if damage in (_not_finite, _huge):
        assert curves(page)["loss"]["run"][1][1] is None


@pytest.mark.parametrize("steps, last", [((0, 3), None), ((0,), 0.25)])
def test_a_figure_that_is_not_defined_is_no_number(run, tmp_path, steps, last):
    changed = copy(run, tmp_path / "run")
    for step in (0, 3):
        path = changed / "evaluation" / f"scenes-{step:06d}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "acc_at_50": None if step in steps else 0.25}))
    rewrite_metrics(changed, lambda line: {key: value for key, value in line.items() if "/acc_at_50" not in key})
    content, page = make(tmp_path / "report.html", changed)
    story, = read_stories(read_runs([str(changed)]))
    assert (story.first_value, story.last_value, story.best_value) == (None, last, last)
    row = re.search(r"<tr><th>scenes</th><td>Acc@0\.5</td>((?:<td class=\"n\">[^<]*</td>){4})", content)
    first, final, difference, best = re.findall(r">([^<]*)</td>", row[1])
    assert (first, difference) == ("-", "-")
    assert (final, best) == (("-", "-") if last is None else ("0.250", "0.250 (3)"))


def test_a_resumed_run_is_one_curve_and_an_old_one_is_quiet(run, tmp_path):
    resumed = copy(run, tmp_path / "run")
    again = [{**line, "loss": 7.0 + line["step"]} for line in training_lines(run) if line["step"] > 1]
    with (resumed / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    found, = read_runs([str(resumed)])
    assert list(found.series["loss"].items())[1:] == [(2, 9.0), (3, 10.0)] and found.last_step == 3
    _still_going(resumed)
    for name in ("metrics.jsonl", "run.json"):
        os.utime(resumed / name, (1e9, 1e9))
    assert status(read_runs([str(resumed)])[0])[0] == "bad"


@pytest.mark.parametrize("make_folder, words", [
    (lambda path: path / "absent", "is no folder"), (lambda path: path, "holds no run"),
    (lambda path: (shutil.copytree(path.parent / "given", path / "inner"), path)[1], "inner")])
def test_a_folder_without_a_run_is_one_clear_error(run, tmp_path, capsys, make_folder, words):
    copy(run, tmp_path / "given")
    (tmp_path / "folder").mkdir()
    assert report.main([str(run), str(make_folder(tmp_path / "folder")), "--out", str(tmp_path / "x.html")]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.err.count("\n") == 1 and shown.err.startswith("report: error: ")
    assert not shown.out and not (tmp_path / "x.html").exists()


def test_a_long_run_makes_a_small_page_that_keeps_its_peaks(run, tmp_path):
    long = copy(run, tmp_path / "run")
    line = training_lines(run)[0]
    lines = [{name: value * (1 + math.sin(step * (i + 1)) / 3) if isinstance(value, float) else value
              for i, (name, value) in enumerate(line.items())} | {"step": step} for step in range(1, 1001)]
    lines[428]["loss"] = 1e3
    (long / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content, page = make(tmp_path / "report.html", long)
    assert len(content.encode()) < 3e6
    steps, values = curves(page)["loss"]["run"]
    assert len(steps) < 300 and (steps[0], steps[-1]) == (1, 1000) and values[steps.index(429)] == 1e3
    assert all(value == pytest.approx(lines[step - 1]["loss"], rel=1e-5) for step, value in zip(steps, values))


def test_means_and_thinning_leave_gaps_where_there_is_no_number():
    assert moving_mean([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(moving_mean([math.nan, 1.0], 1)[0])
    values = [float(step % 7) for step in range(100)]
    values[50:52] = [math.nan, math.nan]
    kept = thin(Line(0, list(range(100)), values, values), 4)
    assert {0, 99} <= set(kept.steps) and len(kept.steps) <= 13 and any(math.isnan(value) for value in kept.values)
    assert all(step == value or values[step] == value or math.isnan(value)
               for step, value in zip(kept.steps, kept.values))
    assert distinct_names([Path("/a/b/run"), Path("/c/b/run"), Path("/d")]) == ["a/b/run", "c/b/run", "d"]


def open_page(path: Path, *options: str) -> tuple[str, str]:
    """(output, messages) of headless Chromium."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                           f"--user-data-dir={path.parent / 'browser'}", *options, path.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert not re.findall(r"CONSOLE.*", done.stderr)
    return done.stdout, done.stderr


@needs_browser
def test_a_browser_shows_the_page_and_runs_its_script(run, tmp_path):
    path, picture = tmp_path / "report.html", tmp_path / "page.png"
    longer = copy(run, tmp_path / "run")
    line = next(line for line in training_lines(run))
    (longer / "metrics.jsonl").write_text("".join(json.dumps({name: value + step if isinstance(
        value, (int, float)) else value for name, value in line.items()} | {"step": step}) + "\n"
        for step in range(1, 41)))
    content, page = make(path, longer, "--smooth", "1")
    open_page(path, f"--screenshot={picture}", "--window-size=1200,1800", "--hide-scrollbars")
    shown = Image.open(picture).convert("RGB")
    assert shown.size == (1200, 1800) and min(ImageStat.Stat(shown.convert("L")).stddev) > 10
    assert len(shown.getcolors(1 << 22)) > 100
    # A pointer over the middle of each chart: a script that the page's own policy would not let in.
    pointer = ('<script>for (const plot of document.querySelectorAll(".plot")) { const box = plot.getBoundingClientRect'
               '(); plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.57})); }'
               "</script>")
    assert "</body>" in content
    path.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content).replace(
        "</body>", pointer + "</body>"))
    dom, _ = open_page(path, "--dump-dom")
    tips = re.findall(r'<div class="tip"[^>]*>([^<]+)</div>', dom)
    assert f'data-charts="{len(tips)}"' in dom and len(tips) == len(curves(page)) > 5
    for tip, of in zip(tips, curves(page).values()):
        steps, values = of["run"]
        assert tip.split()[1:] == ["at", "step", "21"]
        assert float(tip.split()[0]) == pytest.approx(values[steps.index(21)], rel=1e-4)


@needs_browser
def test_the_policy_of_the_page_lets_in_its_own_script_alone(run, tmp_path):
    path = tmp_path / "report.html"
    content, page = make(path, run)
    path.write_text(content.replace("</body>", '<script>document.title = "taken"</script></body>'))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path / 'browser'}", path.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert "<title>first/run</title>" in done.stdout and f'data-charts="{len(curves(page))}"' in done.stdout
