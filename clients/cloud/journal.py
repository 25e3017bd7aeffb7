"""What is about to be sent to a cloud, written down before it is: whoever stops a run in between still knows.

One JSON object an attempt, a line each, in `sent.jsonl` beside the run's answers. Several workers append to it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from untether.clients.cloud.records import CloudRequest
from untether.sim.core.clock import WallClock
from untether.sim.core.durable import cannot_write
from untether.sim.core.errors import ResumableStop


class Journal:
    """The file; each line is on its way to the disk before the request is on its way to the cloud."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def note(self, request: CloudRequest, draw: int, host: str) -> None:
        """Notes an attempt and the user's items that it carries. Raises ResumableStop where that cannot be written."""
        line = {
            "at": WallClock().timestamp(), "host": host, "device_id": request.device_id,
            "request_id": request.request_id, "draw": draw, "round": request.round, "seed": request.seed,
            "items": [
                {"item_id": item.item_id, "kind": item.kind, "chars": item.chars, "masked": item.masked}
                for item in request.uploaded
            ],
        }  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(number, (json.dumps(line) + "\n").encode())  # one write: lines of two workers stay apart
            finally:
                os.close(number)
        except OSError as error:
            raise ResumableStop(cannot_write(self.path, error)) from error

    def lines(self) -> list[dict[str, Any]]:
        """Returns what was noted; a line that a dying machine left half is left out."""
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
