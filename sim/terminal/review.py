"""The command `untether review`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def review(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run directory, with samples.")],
    device: Annotated[str, typer.Option(help="Only this device's samples, such as d00003; default: all.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File of decisions; default: RUN/reviews.jsonl.")
    ] = None,
) -> None:
    """Decide on a run's synthetic samples: accept, reject, skip, undo, one key each.

    Every decision is kept at once; the same command goes on where it stopped. A later run follows the decisions with
    `filters.order` naming `human` and `filters.human.decisions` naming the file.
    """
    from untether.sim.terminal.reviewing import run_review

    run_review(directory, device, out)
