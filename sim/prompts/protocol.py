"""The protocol between device and cloud, as text that both sides can parse.

A device and a cloud generator share nothing but chat messages, so this module is the whole wire format: the two prompts
(samples for augmentation, an answer for the `cloud` arm), the parser of messages into a `Request` (a generator sees
only what the request carries: no ids, no dates, no other user), the JSON schema of an answer and its tolerant reader.

Every line of the user message that carries a user's text is one JSON object, so no text can break the format around it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from untether.sim.core.records import Interaction
from untether.sim.core.text import plain, valid
from untether.sim.prompts.wording import (
    ANSWER_SYSTEM,
    ANSWER_USER,
    FORMS,
    LABELS,
    SAMPLES_SYSTEM,
    SAMPLES_USER,
    TASK_FORMS,
    TaskForm,
    prompt_templates,
)

__all__ = [
    "NotARequest",
    "Pair",
    "ParsedSamples",
    "Prompt",
    "Request",
    "TaskLike",
    "Uploaded",
    "build_answer_request",
    "build_samples_request",
    "clean",
    "estimate_tokens",
    "format_samples",
    "parse_request",
    "parse_samples",
    "prompt_templates",
    "response_format",
]


MAX_PAIRS = 1024
"""Most pairs that one request may ask for."""

CHARS_PER_TOKEN = 4
"""About, of English text; where no tokenizer is known."""


Mask = Callable[[str], tuple[str, int]]
"""A text as it may be uploaded, and how many places of it were masked."""


class TaskLike(Protocol):
    """What this module needs of a task (`sim.population.tasks` has the tasks)."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def labels(self) -> Sequence[str] | None: ...


@dataclass(frozen=True, slots=True)
class Uploaded:
    """One item that a request carries: `chars` of its content that leave the device, `cut` if it was shortened.

    `kind`: `history`, or `question` for the query to answer. `begins`, `ends`: its place in the messages, as shares of
    their characters. `masked`: how many places of it were masked.
    """

    item_id: str
    chars: int
    cut: bool = False
    kind: str = "history"
    begins: float = 0.0
    ends: float = 1.0
    masked: int = 0

    def sent(self, copies: float) -> int:
        """Returns how many of its characters so many copies of the messages carry; the last copy may be partial."""
        whole = math.floor(copies + 1e-9)
        part = (copies - whole - self.begins) / (self.ends - self.begins)
        return whole * self.chars + math.floor(min(1.0, max(0.0, part)) * self.chars)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Chat messages for the cloud, and the user's items in them (for the privacy ledger)."""

    messages: tuple[dict[str, str], ...]
    uploaded: tuple[Uploaded, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What a generator sees: exactly what the messages carry.

    `kind` is `samples` or `answer`. `items` are in history order (oldest first), with neither ids nor dates of their
    own. `count` is how many pairs are wanted (0 for an answer), `query` the input to answer (empty for samples).
    """

    kind: str
    task: str
    items: tuple[Interaction, ...]
    count: int = 0
    query: str = ""
    labels: tuple[str, ...] = ()


class Pair(NamedTuple):
    """One synthetic pair as read from an answer."""

    input: str
    output: str


class ParsedSamples(NamedTuple):
    """The valid pairs of an answer and, by name, the number of faults in it (empty: strict and clean)."""

    pairs: tuple[Pair, ...]
    problems: dict[str, int]


class NotARequest(ValueError):
    """The messages are not of this protocol, so a generator that reads requests cannot answer them."""


def build_samples_request(
    task: TaskLike,
    items: Sequence[Interaction],
    count: int,
    *,
    max_items: int = 16,
    max_chars: int = 8000,
    max_item_chars: int = 2000,
    mask: Mask | None = None,
) -> Prompt:
    """Returns a prompt that asks for `count` new pairs in the style of `items`.

    Args:
        task: The task.
        items: In history order, oldest first; the newest are shown first. The newest is always shown, cut if necessary.
        count: How many pairs.
        max_items: Most items that are shown.
        max_chars: Most characters of content that are shown.
        max_item_chars: Most characters of an item: an input is cut to what its output leaves of them.
        mask: Masks each text before it is cut; None: nothing is masked.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    shown, uploaded = _choose(items, max_items, max_chars, max_item_chars, mask)
    user = SAMPLES_USER.format(count=count, **_frame(task, shown))
    return _prompt(SAMPLES_SYSTEM, user, uploaded, task)


def build_answer_request(
    task: TaskLike,
    items: Sequence[Interaction],
    query: str,
    *,
    query_id: str = "query",
    max_items: int = 16,
    max_chars: int = 8000,
    max_item_chars: int = 2000,
    mask: Mask | None = None,
) -> Prompt:
    """Returns a prompt that asks the cloud model to answer `query`, with the history in it.

    Args:
        task: The task.
        items: In history order, oldest first.
        query: Its content; it counts as uploaded, whole.
        query_id: Its name in the privacy ledger.
        max_items, max_chars, max_item_chars, mask: As in `build_samples_request`.
    """
    shown, uploaded = _choose(items, max_items, max_chars, max_item_chars, mask)
    query, masked = (mask or _unmasked)(clean(query))
    user = ANSWER_USER.format(query=_dumps({"input": query}), **_frame(task, shown))
    question = Uploaded(query_id, len(query), kind="question", masked=masked)
    return _prompt(ANSWER_SYSTEM, user, (*uploaded, question), task)


_HEAD = re.compile(r"\ATask: (?P<name>\S+) \(")
_COUNT = re.compile(r"^Write (\d+) new input-output pairs of this task for this user\.$", re.MULTILINE)


def parse_request(messages: Sequence[dict[str, Any]]) -> Request:
    """Parses chat messages into a request.

    Raises:
        NotARequest: The messages are others.
    """
    users = [m for m in messages if m.get("role") == "user"]
    text = _content(users[-1]) if users else ""
    head = _HEAD.match(text)
    if head is None:
        raise NotARequest("the last user message does not begin with 'Task: NAME (TITLE)'")
    before, marker, rest = text.partition("one JSON object a line:\n")
    lines, end, after = rest.partition("End of samples.\n")
    if not marker or not end:
        raise NotARequest("the user message has no block of samples")
    task = head["name"]
    try:
        shown = [json.loads(line) for line in lines.split("\n") if line.strip()]
        items = tuple(
            Interaction(f"shown-{i}", task, str(o["input"]), str(o["output"]), None, str(o.get("form", "query")))
            for i, o in enumerate(reversed(shown))
        )
        found = re.search(r"exactly one of these labels: (\[.*\])$", before, re.MULTILINE)
        labels = tuple(map(str, json.loads(found[1]))) if found else ()
        if count := _COUNT.search(after):
            if len(count[1]) > 4 or int(count[1]) > MAX_PAIRS:
                raise NotARequest(f"it asks for more than {MAX_PAIRS} pairs at once")
            return Request("samples", task, items, int(count[1]), "", labels)
        lines_after = [line for line in after.split("\n") if line.startswith("{")]
        query = json.loads(lines_after[-1] if lines_after else "")["input"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotARequest(f"the user message does not follow the protocol: {error}") from error
    return Request("answer", task, items, 0, str(query), labels)


def response_format(labels: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the `response_format` of a samples request (OpenAI structured outputs); `labels` restrict the outputs."""
    output: dict[str, Any] = {"type": "string", "enum": list(labels)} if labels else {"type": "string"}
    pair = {
        "type": "object",
        "properties": {"input": {"type": "string"}, "output": output},
        "required": ["input", "output"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {"samples": {"type": "array", "items": pair}},
        "required": ["samples"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "samples", "strict": True, "schema": schema}}


def format_samples(pairs: Sequence[tuple[str, str]]) -> str:
    """Returns the answer to a samples request, as a generator writes it."""
    return json.dumps({"samples": [{"input": a, "output": b} for a, b in pairs]}, ensure_ascii=False)


_SALVAGE_MAX_CHARS = 1_000_000
_SALVAGE_MAX_STARTS = 5_000
_OPENING = re.compile(r'\{\s*("|\Z)')


def parse_samples(text: str) -> ParsedSamples:
    """Reads the pairs of an answer: strictly, or else every valid object found in truncated, fenced or chatty text.

    A pair needs a non-empty string (or a finite number: `4` and `4.0` read as `"4"`) for both `input` and `output`;
    anything else is counted: `missing_field`, `empty_field`, `wrong_type`, `not_an_object`. A text that is not the
    requested JSON counts once as `not_strict_json`, one cut short also as `truncated`. Never raises.
    """
    pairs: list[Pair] = []
    problems: dict[str, int] = {}
    whole = _whole_json(text)
    if isinstance(whole, str):  # JSON written as a JSON string
        _count(problems, "not_strict_json")
        text, whole = whole, _whole_json(whole)
    if isinstance(whole, dict) and isinstance(whole.get("samples"), list):
        for entry in whole["samples"]:
            _take(entry, pairs, problems)
        return ParsedSamples(tuple(pairs), problems)
    problems["not_strict_json"] = 1
    _salvage(text[:_SALVAGE_MAX_CHARS], pairs, problems)
    return ParsedSamples(tuple(pairs), problems)


def _whole_json(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError):  # no JSON, a number without end, or nested without end
        return None


def estimate_tokens(text: str) -> int:
    """Estimates the tokens of a text without a tokenizer: one for every four characters begun, as in English text."""
    return -(-len(text) // CHARS_PER_TOKEN)


def clean(text: str) -> str:
    """Returns `text` as valid Unicode (`sim.core.text.valid`)."""
    return valid(text)


def _salvage(text: str, pairs: list[Pair], problems: dict[str, int]) -> None:
    """Walk over every `{` that begins a whole JSON object (raw newlines in strings allowed) and take its pairs."""
    decoder = json.JSONDecoder(strict=False)
    position = text.find("{")
    tail_open = False
    for _ in range(_SALVAGE_MAX_STARTS):
        if position < 0:
            break
        try:
            found, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):  # no object, or one nested without end
            tail_open = tail_open or _OPENING.match(text, position) is not None
            position = text.find("{", position + 1)
            continue
        inner = next((v for v in found.values() if isinstance(v, list)), None)
        tail_open = tail_open and "]" not in text[end:]
        if "input" not in found and "output" not in found and inner is not None:
            for entry in inner:
                _take(entry, pairs, problems)
        else:
            _take(found, pairs, problems)
        position = text.find("{", end)
    if tail_open:
        _count(problems, "truncated")


def _take(entry: object, pairs: list[Pair], problems: dict[str, int]) -> None:
    if not isinstance(entry, dict):
        return _count(problems, "not_an_object")
    if "input" not in entry or "output" not in entry:
        return _count(problems, "missing_field")
    values = [_text(entry["input"]), _text(entry["output"])]
    if None in values:
        return _count(problems, "wrong_type")
    if not all(values):
        return _count(problems, "empty_field")
    pairs.append(Pair(*values))


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return plain(value).strip()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if abs(value) >= 1e15:
        return None
    return str(int(value)) if value == int(value) else str(value)


def _count(problems: dict[str, int], name: str) -> None:
    problems[name] = problems.get(name, 0) + 1


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _content(message: dict[str, Any]) -> str:
    """The text of a message, whose content OpenAI allows as a string or as a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def _unmasked(text: str) -> tuple[str, int]:
    return text, 0


def _choose(
    items: Sequence[Interaction], max_items: int, max_chars: int, max_item_chars: int, mask: Mask | None
) -> tuple[list[Interaction], tuple[Uploaded, ...]]:
    """The newest items that fit, newest first, as shown, and what each of them uploads."""
    shown: list[Interaction] = []
    uploaded: list[Uploaded] = []
    left = max_chars
    for item in list(reversed(items))[: max(max_items, 0)]:
        limit = max_item_chars if shown else min(max_item_chars, left)
        (text, inside), (output, beside) = map(mask or _unmasked, (clean(item.input), clean(item.output)))
        kept_output = output[:limit]
        kept = text[: max(limit - len(kept_output), 0)]
        size = len(kept) + len(kept_output)
        if size > left:
            break
        left -= size
        shown.append(Interaction(item.item_id, item.task, kept, kept_output, item.time_s, item.form))
        uploaded.append(Uploaded(item.item_id, size, size < len(text) + len(output), masked=inside + beside))
    return shown, tuple(uploaded)


def _frame(task: TaskLike, shown: Sequence[Interaction]) -> dict[str, str]:
    labels = tuple(getattr(task, "labels", None) or ())
    form = TASK_FORMS.get(task.name) or TaskForm(
        f"{task.title.rstrip('.')}.", 'A pair: "input" and "output" have the form of the samples.'
    )
    lines = []
    for item in shown:
        mark = {"form": item.form} if item.form != "query" else {}
        lines.append(_dumps({**mark, "input": item.input, "output": item.output}))
    marked = form.item_form and any(item.form != "query" for item in shown)
    return {
        "name": task.name,
        "title": task.title,
        "description": form.description,
        "labels": LABELS.format(labels=_dumps(list(labels))) if labels else "",
        "forms": FORMS.format(form=form.item_form) if marked else "",
        "items": "\n".join(lines),
        "pair_form": form.pair_form,
    }


def _prompt(system: str, user: str, uploaded: tuple[Uploaded, ...], task: TaskLike) -> Prompt:
    messages = ({"role": "system", "content": system}, {"role": "user", "content": user})
    return Prompt(messages, _placed(system, user, uploaded), tuple(getattr(task, "labels", None) or ()))


def _placed(system: str, user: str, uploaded: Sequence[Uploaded]) -> tuple[Uploaded, ...]:
    """The items with their places in the messages: each is a line of its own, and they come in this order."""
    lines, at, whole = [], len(system), len(system) + len(user)
    for line in user.split("\n"):
        if line.startswith("{"):
            lines.append((at / whole, (at + len(line)) / whole))
        at += len(line) + 1
    return tuple(
        replace(item, begins=begins, ends=ends) for item, (begins, ends) in zip(uploaded, lines, strict=False)
    )
