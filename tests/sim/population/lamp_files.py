"""Small files in LaMP's format, and what was left out of them: what tests of real data share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

HEADLINE = "Generate a headline for the following article: "


def write(folder: Path, questions: object, golds: object = None, split: str = "dev") -> Path:
    """LaMP files: `golds` is {id: output}; by default every question's gold is "G of ID"."""
    folder.mkdir(parents=True, exist_ok=True)
    if golds is None:
        golds = {question["id"]: f"G of {question['id']}" for question in questions}
    outputs = {"task": folder.name, "golds": [{"id": i, "output": o} for i, o in golds.items()]}
    (folder / f"{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"{split}_outputs.json").write_text(json.dumps(outputs))
    return folder


def article(day: int, **more: object) -> dict:
    return {"id": f"i{day}", "title": f"title {day}", "text": f"text {day}", "date": f"2020-01-{day:02}"} | more


def question(name: str, day: int | None, profile: list[dict], user: str | None = "ann") -> dict:
    dated = {} if day is None else {"date": f"2020-01-{day:02}"}
    owner = {} if user is None else {"user_id": user}
    return {"id": name, "input": f"{HEADLINE}article {name}", "profile": profile} | dated | owner


def reasons(exclusions: list) -> Counter:
    return Counter(exclusion.reason for exclusion in exclusions)
