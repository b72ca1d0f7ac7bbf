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


def make(spec: dict[str, Any], rank: int, exchange):
    """The source of one data-parallel rank; with an exchange it decodes its own records only and tells of bad ones."""
    from megavg.data.mixture import Mixture
    from megavg.data.shards import PromptSource

    kind, data = (Mixture, spec["mixture"]) if "mixture" in spec else (PromptSource, spec["shards"])
    return kind(data, spec["batch_size"], spec["seed"], rank, spec["dp_size"], shuffle_buffer=spec["shuffle_buffer"],
                on_error="skip", num_workers=spec["num_workers"],
                agree=exchange.agree_of(rank) if exchange else None)


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


def draw(ranks: list, together: bool) -> list[list]:
    """Each rank's share of the next batch: one after the other, or in a thread for each, as ranks that agree must."""
    if not together:
        return [source.next_batch() for source in ranks]
    from tests.rank_threads import in_threads

    shares = in_threads(ranks, lambda source: source.next_batch())
    for share in shares:
        if isinstance(share, Exception):
            raise share
    return shares


def main() -> None:
    """Draw batches for all ranks; log the samples of each; keep a checkpoint every third batch."""
    spec = json.loads(sys.argv[1])
    exchange = None
    if spec["agree"]:
        from tests.rank_threads import Exchange

        exchange = Exchange(spec["dp_size"])
    ranks = [make(spec, rank, exchange) for rank in range(spec["dp_size"])]
    done = load(spec, ranks)
    for number in range(done, spec["num_batches"]):
        batch = [None] * spec["batch_size"]
        for rank, samples in enumerate(draw(ranks, spec["agree"])):
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
