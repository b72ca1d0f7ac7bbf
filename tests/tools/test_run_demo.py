"""The demo's whole way on a few steps: the files it promises, with the keys it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {"acc_at_50", "mean_iou", "parse_rate"}


@pytest.mark.slow
def test_a_short_demo_leaves_summary_and_picture(tmp_path):
    """Two ranks under tensor parallelism, through the deepspeed launcher, with another algorithm than the default."""
    out = tmp_path / "demo"
    command = [sys.executable, "tools/run_demo.py", "--out", str(out), "--num-scenes", "64", "--warmup-steps", "2",
               "trainer.num_steps=2", "parallel.tensor_model_parallel_size=2", "algorithm.name=ecvgpo",
               "evaluation.limit=8", "data.prompts_per_step=4", "data.check_frame=off"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]

    summary = json.loads((out / "summary.json").read_text())
    for name in ("held_out_scenes", "real_screens", "real_crops"):
        for when in ("before", "after"):
            assert set(summary[name][when]) == FIGURES
            assert all(0 <= value <= 1 for value in summary[name][when].values())
    assert summary["algorithm"] == "ecvgpo" and summary["layout"] == "TP2 x PP1 x DP1"
    assert set(summary["seconds"]) == {"data", "warmup", "rl"}
    assert min(Image.open(out / "boxes.png").size) > 400
    assert "held_out_scenes" in finished.stdout and "Acc@0.5" in finished.stdout
