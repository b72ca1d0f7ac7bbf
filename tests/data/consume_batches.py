"""A program that draws batches as training does, keeps checkpoints, and can be killed at any time and started again.

    python tests/data/consume_batches.py '{"shards": [...], "dp_size": 2, "num_workers": 0, "num_batches": 30, ...}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def make(spec: dict[str, Any], rank: int):
    """The source of one data-parallel rank."""
    from megavg.data.mixture import Mixture
    from megavg.data.shards import PromptSource

    kind, data = (Mixture, spec["mixture"]) if "mixture" in spec else (PromptSource, spec["shards"])
    return kind(data, spec["batch_size"], spec["seed"], rank, spec["dp_size"], shuffle_buffer=spec["shuffle_buffer"],
                on_error="skip", num_workers=spec["num_workers"])


def load(spec: dict[str, Any], ranks: list) -> int:
    """Go back to the last checkpoint: positions, and the log as it was then. Returns how many batches it holds."""
    if not os.path.exists(spec["checkpoint"]):
        open(spec["log"], "w").close()
        return 0
    with open(spec["checkpoint"]) as file:
        saved = json.load(file)
    os.truncate(spec["log"], saved["log_bytes"])
    for rank in ranks:
        rank.load_state_dict(saved["data"])
    return saved["num_batches"]


def save(spec: dict[str, Any], rank, num_batches: int) -> None:
    """Write a checkpoint beside and rename it."""
    state = {"data": rank.state_dict(), "num_batches": num_batches, "log_bytes": os.path.getsize(spec["log"])}
    with open(spec["checkpoint"] + ".tmp", "w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(spec["checkpoint"] + ".tmp", spec["checkpoint"])


def main() -> None:
    """Draw batches for all ranks side by side; log the samples of each; keep a checkpoint every third batch."""
    spec = json.loads(sys.argv[1])
    ranks = [make(spec, rank) for rank in range(spec["dp_size"])]
    done = load(spec, ranks)
    for number in range(done, spec["num_batches"]):
        batch = [None] * spec["batch_size"]
        for rank, source in enumerate(ranks):
            samples = source.next_batch()
            assert all(sample.image.size == (sample.width, sample.height) for sample in samples)
            batch[rank::spec["dp_size"]] = [os.path.basename(sample.shard) + "/" + sample.key for sample in samples]
        with open(spec["log"], "a") as log:
            log.write(json.dumps(batch) + "\n")
            log.flush()
            os.fsync(log.fileno())
        if number % 3 == 2:
            save(spec, ranks[number % len(ranks)], number + 1)
        time.sleep(spec["pause"])


if __name__ == "__main__":
    main()
