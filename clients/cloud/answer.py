"""A completion's body, from whatever serves it: OpenAI's own form, those of others, and what calls itself one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from untether.sim.core import strict_json
from untether.sim.core.text import plain, shown

MAX_TOKENS_TOLD = 10**9


class NotAnAnswer(ValueError):
    """The body is no completion: an error page, another service."""


class Unusable(ValueError):
    """The body is a completion whose answer cannot be used; it was paid for all the same."""


class ErrorInside(ValueError):
    """The endpoint's error in the body of a success: `status` is the one it should have had, `body` what it says."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"an error inside a success: {status}")
        self.status, self.body = status, body


@dataclass(frozen=True, slots=True)
class CloudAnswer:
    """What the endpoint answered. `thought`: whether it also wrote down its reasoning, which is no part of `text`;
    `note`: what one of our own gateways says of it, such as what of the request was left out.
    """

    text: str
    refusal: str = ""
    finish_reason: str = ""
    model: str = ""
    fingerprint: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    thought: bool = False
    note: str = ""

    @property
    def cut_before_it_began(self) -> bool:
        """Whether all tokens were spent before the first word of the answer, as a model that reasons at length does."""
        return self.finish_reason == "length" and not self.text.strip() and not self.refusal


def read_answer(body: bytes) -> CloudAnswer:
    """Returns the parts of a chat completion that matter; a stream of events is put together first.

    Raises:
        NotAnAnswer: It is no completion.
        Unusable: It is one, and its content is nothing that can be read.
        ErrorInside: It is an error, in the place of the choices or in a choice.
    """
    if body.lstrip().startswith((b"data:", b"event:", b":")):  # a line that begins with a colon keeps a stream alive
        return _streamed(body)
    try:
        whole = strict_json.loads(body)
    except ValueError as error:
        if b'"choices"' in body[:4096]:
            raise Unusable(f"the completion cannot be read: {error}") from error
        raise _no_completion(body) from error
    return _completion(whole, body)


def _completion(whole: Any, body: bytes) -> CloudAnswer:
    if not isinstance(whole, dict):
        raise _no_completion(body)
    choices = whole.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        named = ("choices", "usage", "id", "model")
        said = {name: value for name, value in whole.items() if value and name not in named}
        if whole.get("error") or "choices" in whole or {"detail", "message", "msg"} & set(whole):
            raise ErrorInside(_status_of(whole), whole.get("error") or said)
        raise _no_completion(body)
    finish = _finish(choice.get("finish_reason"))
    if choice.get("error") or finish == "error":
        raise ErrorInside(_status_of(choice), choice.get("error") or "finish_reason = error")
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}  # the older completions API
    text, thought = _content(message)
    usage = whole["usage"] if isinstance(whole.get("usage"), dict) else {}
    refusal = message.get("refusal")
    return split_thought(CloudAnswer(
        plain(text), shown(refusal, 300) if isinstance(refusal, str) else "",
        finish, _name(whole.get("model")), _name(whole.get("system_fingerprint")),
        _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), thought, _name(whole.get("note")),
    ))  # fmt: skip


def _content(message: dict[str, Any]) -> tuple[str, bool]:
    """The text of a message, and whether reasoning stands beside it."""
    content = message.get("content")
    thought = any(isinstance(message.get(name), (str, list)) and bool(message[name]) for name in (
        "reasoning_content", "reasoning", "thinking"
    ))  # fmt: skip
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        thought = thought or any(part.get("type") in ("thinking", "reasoning") for part in parts)
        content = "".join(
            part["text"] for part in parts
            if part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str)
        )  # fmt: skip
    if not content and isinstance(message.get("tool_calls"), list):  # some servers make a schema a tool
        content = next(_arguments(message["tool_calls"]), "")
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Unusable(f"the message's content is {type(content).__name__}, not text")
    return content, thought


def _arguments(calls: list[Any]) -> Iterator[str]:
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            yield function["arguments"]


def _streamed(body: bytes) -> CloudAnswer:
    """A completion that came as server-sent events, whether or not that was asked for."""
    texts: list[str] = []
    thought = False
    last: dict[str, Any] = {}
    finish = ""
    for line in body.decode("utf-8", "replace").splitlines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            continue
        try:
            chunk = strict_json.loads(data)
        except ValueError as error:
            raise Unusable(f"an event of the stream cannot be read: {error}") from error
        if not isinstance(chunk, dict):
            continue
        if chunk.get("error"):
            raise ErrorInside(_status_of(chunk), chunk["error"])
        last |= {name: value for name, value in chunk.items() if value}
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        delta = choice.get("delta") or choice.get("message") or {}
        if isinstance(delta, dict):
            text, one = _content(delta)
            texts.append(text)
            thought |= one
        finish = choice.get("finish_reason") or finish
    if not last:
        raise _no_completion(body)
    message = {"content": "".join(texts), "reasoning": "yes" if thought else ""}
    return _completion(last | {"choices": [{"message": message, "finish_reason": finish}]}, body)


def _status_of(holder: dict[str, Any]) -> int:
    """The status an error inside a success should have had."""
    inner = holder.get("error")
    for place in (inner if isinstance(inner, dict) else {}, holder):
        for name in ("code", "status", "status_code"):
            value = place.get(name)
            if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
                return value
    return 500


def _no_completion(body: bytes) -> NotAnAnswer:
    return NotAnAnswer(f"the body is no chat completion but begins with {shown(body[:80].decode(errors='replace'))!r}")


def _name(value: object, limit: int = 200) -> str:
    return shown(value, limit) if isinstance(value, str) else ""


def _finish(value: object) -> str:
    """Why an answer ends, in OpenAI's words where others have theirs (`MAX_TOKENS`, `content_filter: OTHER`)."""
    said = _name(value, 40)
    word = said.lower()
    if word in ("max_tokens", "max_output_tokens", "max_length", "token_limit"):
        return "length"
    return "content_filter" if word.startswith(("content_filter", "safety")) else word if word == "error" else said


def _count(value: object) -> int | None:
    """Tokens as an endpoint tells them: 50, 50.0 or "50"; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value != int(value):
        return None
    return int(value) if 0 <= value <= MAX_TOKENS_TOLD else None


# --- reasoning ------------------------------------------------------------------------------------------------

_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|seed:think"
_OPENING = re.compile(rf"\s*(?:<({_TAGS})>|\[(THINK)\]|◁think▷|<\|START_THINKING\|>)", re.IGNORECASE)
_CLOSING = re.compile(rf"(?:</(?:{_TAGS})>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>)", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
_MARK = re.compile(r"<\|(?:end|return|call|start)\|>")


def split_thought(answer: CloudAnswer) -> CloudAnswer:
    """Returns the answer without the reasoning that stands before it, where an endpoint leaves that in the content.

    Only what opens the content is taken for reasoning: the same word within an answer is a word.
    """
    text = answer.text
    channels = list(_CHANNEL.finditer(text)) if text.lstrip().startswith(("<|channel|>", "<|start|>")) else []
    if channels:
        last = channels[-1]
        end = _MARK.search(text, last.end())
        final = text[last.end() : end.start() if end else None] if last[1].lower() == "final" else ""
        return replace(answer, text=final, thought=True)
    opening = _OPENING.match(text)
    closing = _CLOSING.search(text, opening.end() if opening else 0)
    if opening:
        return replace(answer, text=text[closing.end() :] if closing else "", thought=True)
    if closing and not _is_json(text):  # the template had opened it
        return replace(answer, text=text[closing.end() :], thought=True)
    return answer


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_FENCE = re.compile(r"\A```[\w-]*[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_LABEL = re.compile(r"\A(?:output|answer)\s*:\s*", re.IGNORECASE)
_TAGGED = re.compile(r"\A<(output|answer)>(.*)</\1>\Z", re.IGNORECASE | re.DOTALL)


def unwrapped(text: str) -> str:
    """Returns the answer to a question without what models put around it: a fence, `{"output": ...}`, `Output:`,
    quotes.
    """
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    if tagged := _TAGGED.match(text):
        text = tagged[2].strip()
    if text.startswith("{"):
        try:
            found = strict_json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, dict) and set(found) & {"output", "answer"}:
            inner = found.get("output", found.get("answer"))
            if isinstance(inner, (str, int, float)) and not isinstance(inner, bool):
                text = plain(str(inner)).strip()
    text = _LABEL.sub("", text, count=1)
    if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text
