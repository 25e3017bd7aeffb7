"""Histories that people have, as lines of JSON: commits of a repository, chats, PersonaMem."""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from untether.sim.core import strict_json
from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError

Record = dict[str, Any]
"""One interaction, as `sim.population.formats.jsonl` reads it."""

TYPES = ("build", "chore", "ci", "docs", "feat", "fix", "perf", "refactor", "revert", "style", "test")
"""The types of Conventional Commits (conventionalcommits.org, and those that its Angular convention adds)."""

_TYPED = re.compile(rf"^({'|'.join(TYPES)})(\([^)]*\))?!?:\s*(.+)", re.IGNORECASE)
_MOST_FILES = 12
_END, _FIELD = "\x1e", "\x1f"


def write_rows(rows: Iterable[Record], out: Path) -> int:
    """Writes the rows, a line each, and returns how many. Raises UserError where there are none."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if not lines:
        raise UserError(f"{out}: nothing to write: no interaction was found")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "\n".join(lines) + "\n")
    return len(lines)


def from_git(repository: Path, kind: str = "subject") -> Iterator[Record]:
    """Yields an author's commits, oldest first: from the names of the changed files to the subject (`subject`), or from
    the subject to its Conventional-Commits type (`type`; other commits are left out). Authors are named by a hash of
    their address; merges are left out. Raises UserError where git finds no history there.
    """
    command = [
        "git", "-C", str(repository), "log", "--no-merges", "--reverse", "--name-only",
        f"--pretty=format:{_END}%H{_FIELD}%ae{_FIELD}%aI{_FIELD}%s",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError("data from-git: git is not installed") from None
    if done.returncode:
        raise UserError(f"{repository}: {done.stderr.strip() or 'git log failed'}. Give a repository's folder")
    for entry in done.stdout.split(_END)[1:]:
        head, _, names = entry.partition("\n")
        commit, address, time, subject = head.split(_FIELD, 3)
        files = [name for name in names.splitlines() if name.strip()]
        row = {"user": hashed(address), "time": time, "id": commit[:12], "task": f"commit_{kind}"}
        if kind == "type":
            if found := _TYPED.match(subject):
                yield {**row, "input": found[3].strip(), "output": found[1].lower()}
        elif files and subject.strip():
            more = [f"and {len(files) - _MOST_FILES} more"] if len(files) > _MOST_FILES else []
            yield {**row, "input": "\n".join([*files[:_MOST_FILES], *more]), "output": subject.strip()}


def hashed(address: str) -> str:
    """Returns a name for an e-mail address that does not tell it: the same address, whatever its case, has the same
    name.
    """
    return "author-" + hashlib.blake2b(address.strip().lower().encode(), digest_size=6).hexdigest()


def git_task(kind: str) -> str:
    """Returns the table `[task]` for what `from_git` makes, as TOML."""
    if kind == "type":
        labels = ", ".join(f'"{name}"' for name in TYPES)
        return (
            '[task]\nname = "commit_type"\ntitle = "Commit type"\nkind = "label"\n'
            f"labels = [{labels}]\n"
            'instruction = "Which type is this commit of? Answer with the type alone. Commit: {content}"\n'
        )
    return (
        '[task]\nname = "commit_subject"\ntitle = "Commit subject"\nkind = "text"\nmax_new_tokens = 32\n'
        'instruction = "Write the subject line of a commit that changes these files: {content}"\n'
    )


def from_chat(file: Path, task: str = "chat") -> Iterator[Record]:
    """Yields each user turn and the answer to it, of chats in OpenAI's message form: a line a chat, or a list. Whose it
    is says its `user` or `user_id`, else the file's name; when, its `time`, `created` or `created_at`.
    """
    for number, chat in enumerate(read_records(file), 1):
        where = f"{file}, chat {number}"
        messages = chat.get("messages") if isinstance(chat, Mapping) else chat
        if not isinstance(messages, list):
            raise UserError(f"{where}: no `messages`, a list of {{role, content}}")
        about = chat if isinstance(chat, Mapping) else {}
        time = next((about[name] for name in ("time", "created", "created_at") if about.get(name)), None)
        user = str(about.get("user") or about.get("user_id") or file.stem)
        for place, (said, answer) in enumerate(_turns(where, messages), 1):
            yield _dated({"user": user, "id": f"{number}-{place}", "task": task, "input": said, "output": answer}, time)


def _turns(where: str, messages: list[Any]) -> Iterator[tuple[str, str]]:
    said = ""
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"{where}: a message without a role: {str(message)[:80]}")
        text = _content(message.get("content"))
        if message["role"] == "user":
            said = f"{said}\n{text}".strip()  # two in a row are one turn
        elif message["role"] == "assistant" and said and text:
            yield said, text
            said = ""


def _content(content: Any) -> str:
    """A message's text: what it says itself, or its parts of the type text."""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content or "").strip()


def from_personamem(questions: Path, contexts: Path, task: str = "personamem") -> Iterator[Record]:
    """PersonaMem's questions (CSV) on its shared contexts (JSON lines): a persona's turns are its history, and its
    questions are asked at the turn that they refer to. Turns have no dates; one counts as a day, to keep their order.

    Source: Jiang et al., 2025, arXiv 2504.14225; columns of `questions_32k.csv`, lines of `shared_contexts_32k.jsonl`.
    """
    known: dict[str, list[Any]] = {}
    for record in read_records(contexts):
        known |= record
    told: set[str] = set()
    with questions.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        needed = {"persona_id", "question_id", "user_question_or_message", "correct_answer", "all_options",
                  "shared_context_id", "end_index_in_shared_context"}  # fmt: skip
        if missing := needed - set(reader.fieldnames or ()):
            raise UserError(f"{questions}: no column `{sorted(missing)[0]}`: not PersonaMem's questions")
        for number, line in enumerate(reader, 2):
            name, where = line["shared_context_id"], f"{questions}, line {number}"
            if name not in known:
                raise UserError(f"{where}: shared_context_id {name} is not in {contexts}")
            user = f"persona-{line['persona_id']}-{name[:8]}"
            if name not in told:
                told.add(name)
                yield from _context(user, name, known[name], task)
            day = int(line["end_index_in_shared_context"])
            yield _on_day(
                {"user": user, "id": line["question_id"], "task": task, "split": "query",
                 "input": line["user_question_or_message"].strip(), "output": _option(where, line)}, day,
            )  # fmt: skip


def _context(user: str, name: str, messages: list[Any], task: str) -> Iterator[Record]:
    said = ""
    for place, message in enumerate(messages):
        text = _content(message.get("content"))
        if message.get("role") == "user":
            said = text
        elif message.get("role") == "assistant" and said and text:
            row = {"user": user, "id": f"{name[:8]}-{place}", "task": task, "split": "history"}
            yield _on_day({**row, "input": said, "output": text}, place)
            said = ""


def _option(where: str, line: Mapping[str, str]) -> str:
    """The text of the right option, without its letter."""
    letter = line["correct_answer"].strip()
    try:
        options = [str(option) for option in ast.literal_eval(line["all_options"])]
    except (ValueError, SyntaxError):
        raise UserError(f"{where}: all_options is no list") from None
    for option in options:
        if option.strip().startswith(letter):
            return option.strip().removeprefix(letter).strip()
    raise UserError(f"{where}: correct_answer {letter} is none of the options")


def _on_day(row: Record, day: int) -> Record:
    return {**row, "time": (datetime(2000, 1, 1, tzinfo=UTC) + timedelta(days=day)).date().isoformat()}


def _dated(row: Record, time: Any) -> Record:
    return row if time is None else {**row, "time": time}


def read_records(file: Path) -> Iterator[Any]:
    """Yields the values of a JSON file: a list's items, or a line each. Raises UserError for one that is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if text.lstrip().startswith("["):
        try:
            yield from strict_json.loads(text)
            return
        except ValueError:
            pass  # a list a line
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield strict_json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not JSON: {str(error).removeprefix('line 1: ')}") from None
