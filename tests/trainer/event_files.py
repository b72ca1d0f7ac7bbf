"""Read TensorBoard's event files as TensorBoard does, for tests."""

from __future__ import annotations

from pathlib import Path


def read_board(folder: Path):
    """Everything in a folder of event files, nothing left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={
        "scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    board.Reload()
    return board


def texts(board, tag: str) -> dict[int, str]:
    """The texts under a tag by step, as Markdown."""
    return {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")}
