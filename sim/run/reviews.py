"""A person's decisions on synthetic samples: a file that grows by a line a decision, and outlives a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from untether.sim.core import strict_json
from untether.sim.core.durable import cannot_write
from untether.sim.core.errors import ResumableStop, UserError

ACCEPT, REJECT, SKIP = "accept", "reject", "skip"
DECISIONS = (ACCEPT, REJECT, SKIP)
UNDONE = "undone"


class Reviewed(NamedTuple):
    """What was decided on: a user's sample of a task, by its texts. The same pair in a later run is the same."""

    user_id: str
    task: str
    input: str
    output: str


class ReviewFile:
    """The decisions of one JSONL file, the last line about a sample counting; `undone` takes one back.

    Raises UserError where the file holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._decided: dict[Reviewed, str] = {}
        for number, row in _rows(self.path):
            self._take(row, f"{self.path}, line {number}")

    def decision(self, key: Reviewed) -> str | None:
        """Returns `accept`, `reject`, `skip`, or None where nothing was decided."""
        return self._decided.get(key)

    def __len__(self) -> int:
        return len(self._decided)

    def items(self) -> Iterator[tuple[Reviewed, str]]:
        """Yields what was decided, in the order of the decisions."""
        yield from self._decided.items()

    def decide(self, key: Reviewed, decision: str) -> None:
        """Keeps a decision: it is on the disk when this returns. Raises ResumableStop where it cannot be written."""
        row = {**key._asdict(), "decision": decision}
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise ResumableStop(cannot_write(self.path, error)) from error
        self._take(row, str(self.path))

    def undo(self, key: Reviewed) -> None:
        """Takes the decision on a sample back."""
        self.decide(key, UNDONE)

    def _take(self, row: Mapping[str, Any], where: str) -> None:
        decision = row.get("decision")
        if decision not in (*DECISIONS, UNDONE) or not all(isinstance(row.get(f), str) for f in Reviewed._fields):
            raise UserError(
                f"{where}: no decision of a review. A line is a JSON object with {', '.join(Reviewed._fields)} and "
                f"decision, one of {', '.join((*DECISIONS, UNDONE))}"
            )
        key = Reviewed(*(row[field] for field in Reviewed._fields))
        self._decided.pop(key, None)
        if decision != UNDONE:
            self._decided[key] = str(decision)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The lines of the file by number. A last line that a crash cut short is no decision."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Give the file that `untether review` writes") from None
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = strict_json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            row = None
        yield number, row if isinstance(row, dict) else {}
