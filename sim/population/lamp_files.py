"""Finds and streams LaMP's question and output files, with errors that name the file, the place and the fault."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ijson

from untether.sim.core import strict_json
from untether.sim.core.errors import UserError
from untether.sim.core.text import plain, shown
from untether.sim.population.tasks import Task, get_task, task_names

_LOCATE_UP_TO_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """The question and output files of one task."""

    task: Task
    questions: Path
    outputs: Path


def find_files(path: str | Path, tasks: tuple[str, ...] = (), split: str = "dev") -> list[TaskFiles]:
    """Finds the files of each task below `path`: one task's folder, or the parent of several named LaMP_1, LaMP_2N, ...

    A task's folder holds `{split}_questions.json` and `{split}_outputs.json`, itself or (as downloaded) in a folder
    named by the split.

    Args:
        path: The folder.
        tasks: Which tasks; empty: all that are found.
        split: LaMP's split.

    Raises:
        UserError: The path or a file does not exist, or a task is unknown or absent.
    """
    root = Path(path).expanduser()
    wanted = [get_task(name) for name in tasks]
    if not root.is_dir():
        raise UserError(f"population.path = {str(path)!r}: no such folder. Give a LaMP_* folder or a parent of several")
    if (own := _questions(root, split)) is not None:
        found = {(task := _task_of_folder(root, own, split, wanted)).name: (task, own)}
    else:
        found = {}
        for folder in sorted(child for child in root.iterdir() if child.is_dir()):
            task = next((get_task(n) for n in task_names() if folder.name.replace("-", "_") == n), None)
            if task and (questions := _questions(folder, split)):
                found[task.name] = (task, questions)
    if not found:
        raise UserError(
            f"population.path = {str(path)!r}: no {split}_questions.json here or in a folder named after a task "
            f"({', '.join(task_names())}). Check the path and population.split"
        )
    for task in wanted:
        if task.name not in found:
            raise UserError(
                f"population.tasks: {task.name} has no {split}_questions.json below {root}; found: {', '.join(found)}"
            )
    chosen = [found[task.name] for task in dict.fromkeys(wanted)] or list(found.values())
    return [TaskFiles(task, questions, _outputs(questions, split)) for task, questions in chosen]


def stream_questions(files: TaskFiles) -> Iterator[dict]:
    """Yields the questions one by one, checked for shape: `id`, `input`, `profile`.

    Raises:
        UserError: The file is malformed.
    """
    path, seen = files.questions, set()
    for index, question in enumerate(_stream(path, "item", b"[")):
        where = f"{path}: question {index + 1}"
        if not isinstance(question, dict):
            raise UserError(f"{where} is a {type(question).__name__}: expected an object with id, input and profile")
        for name, kind in (("id", str), ("input", str), ("profile", list)):
            value = question.get(name)
            if name == "id" and isinstance(value, int) and not isinstance(value, bool):
                question["id"] = str(value)
            elif not isinstance(value, kind):
                raise UserError(f"{where} (id {question.get('id')!r}): field {name!r} is missing or no {kind.__name__}")
        where = f"{path}: question {question['id']!r}"
        if question["id"] in seen:
            raise UserError(f"{where} appears twice: ids must be unique, remove or rename one")
        seen.add(question["id"])
        _refuse_other_task(files.task, question["input"], where)
        yield question


def read_golds(files: TaskFiles) -> dict[str, str | None]:
    """Reads the gold texts by question id, as written; None for one that is null or empty.

    Raises:
        UserError: The file is malformed, or a gold is no text.
    """
    golds: dict[str, str | None] = {}
    for index, gold in enumerate(_stream(files.outputs, "golds.item", b"{")):
        if not isinstance(gold, Mapping) or "id" not in gold or "output" not in gold:
            raise UserError(f"{files.outputs}: gold {index + 1} needs the fields id and output")
        if (key := str(gold["id"])) in golds:
            raise UserError(f"{files.outputs}: gold {key!r} appears twice: ids must be unique, remove one")
        golds[key] = _gold_text(gold["output"], f"{files.outputs}: gold {key!r}")
    if not golds:
        raise UserError(f'{files.outputs}: no golds: expected {{"task": ..., "golds": [{{"id": ..., "output": ...}}]}}')
    return golds


def _gold_text(value: object, where: str) -> str | None:
    """A gold as text: a whole number is its digits; None where there is nothing to score against."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    raise UserError(
        f"{where}: output is a {type(value).__name__} ({shown(str(value), 60)}), and a question has one answer: write "
        "one text, or null to leave the question out"
    )


def _questions(folder: Path, split: str) -> Path | None:
    name = f"{split}_questions.json"
    return next((file for file in (folder / name, folder / split / name) if file.is_file()), None)


def _outputs(questions: Path, split: str) -> Path:
    path = questions.with_name(f"{split}_outputs.json")
    if not path.is_file():
        raise UserError(f"{path}: no such file. Answers are scored against it; a split without outputs cannot be used")
    return path


def _task_of_folder(root: Path, questions: Path, split: str, wanted: list[Task]) -> Task:
    """A single folder's task: by its name, else by what its outputs say, else the only task asked for."""
    folders = (root.name, root.parent.name if root.name == split else "")
    for name in (folder.replace("-", "_") for folder in folders):
        if name in task_names():
            return get_task(name)
    declared = next(iter(_stream(_outputs(questions, split), "task", b"{")), None)
    with suppress(UserError):
        return get_task(str(declared))
    if len(wanted) == 1:
        return wanted[0]
    raise UserError(
        f"population.path = {str(root)!r}: which task is this? Name the folder after one of {', '.join(task_names())}"
    )


def _refuse_other_task(task: Task, text: str, where: str) -> None:
    if task.content(text) == text:
        for name in task_names():
            if get_task(name).content(text) != text:
                raise UserError(f"{where} asks {name}'s question, but the folder is {task.name}'s: rename the folder")


def _stream(path: Path, prefix: str, opening: bytes) -> Iterator[object]:
    with path.open("rb") as file:
        head = file.read(512)
        skip = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        first = head[skip:].lstrip()[:1]
        if first == b"<":
            raise UserError(
                f"{path}: holds HTML where JSON should be, most likely an error page saved under this name (a wrong "
                "LaMP address answers with one). Download it again from the address of its task and split"
            )
        if not first:
            raise UserError(f"{path}: is empty where JSON should be. Download it again")
        if first != opening:
            kinds = {b"[": "a list of questions", b"{": "an object with golds"}
            raise UserError(
                f"{path}: expected {kinds[opening]}, but the file starts with {first.decode(errors='replace')!r}"
            )
        file.seek(skip)
        count = 0
        try:
            for item in ijson.items(file, prefix, use_float=True):
                count += 1
                yield item
        except (ijson.JSONError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}{_position(path, skip, count)}. Download or write the file again") from error


def _position(path: Path, skip: int, count: int) -> str:
    """`:LINE:COLUMN: why` of malformed JSON, read anew; for a file too large to hold, after how many records."""
    if path.stat().st_size <= _LOCATE_UP_TO_BYTES:
        try:
            text = path.read_bytes()[skip:].decode("utf-8")
            json.loads(text)
            strict_json.loads(text)
        except json.JSONDecodeError as error:
            return f":{error.lineno}:{error.colno}: malformed JSON: {error.msg} (character {error.pos})"
        except UnicodeDecodeError as error:
            return f": no UTF-8 at byte {error.start + skip}"
        except (ValueError, RecursionError) as error:
            return f": {str(error)[:200]}"
    return f": malformed or truncated JSON after record {count}"
