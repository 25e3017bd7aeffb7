"""What an error of the endpoint means: try again, try again otherwise, an outcome, or the user's mistake."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import openai

from untether.clients.cloud.answer import ErrorInside
from untether.clients.cloud.dialect import named_change
from untether.clients.cloud.wire import proxy_to
from untether.sim.core import strict_json
from untether.sim.core.text import shown

MAX_WORDS = 300


@dataclass(frozen=True, slots=True)
class Fault:
    """An attempt that brought no completion.

    `outcome` as in Attempt. `detail` holds the endpoint's own words. `retry_after_s` is what the endpoint asked for.
    `fatal` says why no retry can help (`user`: a setting is wrong; `stop`: the endpoint will not serve us now).
    `change` is what to do otherwise that the endpoint itself names (`clients.cloud.dialect`); with `unexplained` it
    names nothing, and what may be left out is worth a try. `loading`: it will serve once its model is there.
    """

    outcome: str
    detail: str
    retry_after_s: float | None = None
    fatal: str = ""
    change: str = ""
    unexplained: bool = False
    loading: bool = False
    bytes_up: int = 0
    bytes_down: int = 0


def classify(error: Exception, parameters: Mapping[str, Any]) -> Fault:
    """Returns the fault behind an exception of the openai client or of `read_answer`; `parameters` are those of the
    request.
    """
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("timeout", "no answer within cloud.timeout_s")
    if isinstance(error, openai.APIConnectionError):
        return _unconnected(error)
    if isinstance(error, ErrorInside):
        return _status(error.status, json.dumps({"error": error.body}).encode(), {}, parameters, "HTTP 200 with error")
    if isinstance(error, openai.APIStatusError):
        response = error.response
        sizes = len(error.request.content), len(response.content)
        target = ""
        if 300 <= response.status_code < 400 and (location := response.headers.get("location")):
            target = _target(str(error.request.url), location)
        return _status(response.status_code, response.content, response.headers, parameters, "HTTP", sizes, target)
    if isinstance(error, openai.OpenAIError | ValueError):
        return Fault("not_an_answer", shown(f"{type(error).__name__}: {error}", MAX_WORDS))
    raise error


def _unconnected(error: openai.APIConnectionError) -> Fault:
    cause: BaseException | None = error.__cause__
    name = type(cause).__name__ if cause is not None else ""
    said = str(cause).strip() or "the connection ended"
    detail = shown(f"{name}: {said}" if cause is not None else str(error), MAX_WORDS)
    if "CERTIFICATE_VERIFY_FAILED" in detail:
        remedy = "set SSL_CERT_FILE to the file of the authority that signed it, if you trust it"
        return Fault("unreachable", f"the endpoint's certificate is not trusted ({detail}): {remedy}", fatal="user")
    if "WRONG_VERSION_NUMBER" in detail:
        return Fault("unreachable", f"the endpoint speaks no TLS ({detail}): give its http:// address")
    proxy = proxy_to(str(error.request.url))
    if name == "ProxyError" or name == "ConnectError" and proxy:
        remedy = f"check {proxy or 'its variable'}, or name the host in NO_PROXY"
        return Fault("unreachable", f"the proxy does not let the request through ({detail}): {remedy}")
    return Fault("unreachable" if name in {"ConnectError", "ConnectTimeout"} else "dropped", detail)


def _status(
    status: int, body: bytes, headers: Mapping[str, str], parameters: Mapping[str, Any], how: str,
    sizes: tuple[int, int] = (0, 0), target: str = "",
) -> Fault:  # fmt: skip
    content = _read(body)
    said = words(content, parameters)
    code = _code(content)
    number = f"{how} {status}" + (" (rate-limited)" if status == 429 else "")
    detail = f"{number}: {said}" if said else f"{number}, without a word"
    size = {"bytes_up": sizes[0], "bytes_down": sizes[1]}
    everything = f"{said} {code}"
    change = named_change(everything, _parameter(content), parameters)
    if 300 <= status < 400:
        where = f" to {target}" if target else ""
        detail = f"{how} {status} sends the request elsewhere{where}, and redirects are not followed"
        return Fault("rejected", detail, fatal="user", **size)
    wait_s = retry_after_s(headers)
    if wait_s is None:
        wait_s = wait_in_words(json.dumps(content)[:4000])
    if status == 429 or (status == 402):
        quota = code == "insufficient_quota" or status == 402
        return Fault("rate_limited", detail, wait_s, "stop" if quota else "", **size)
    if code in ("content_filter", "content_policy_violation"):
        return Fault("refused", detail, **size)
    if status in (408, 409, 425) or status >= 500:
        loading = status == 503 and re.search(r"\bload|warm|start(ing|up)|initiali", said, re.IGNORECASE) is not None
        named = change in ("system", "stream") or status == 501 or _UNKNOWN.search(everything) is not None
        return Fault(
            "server_error", detail, wait_s, change=change if named else "",
            unexplained=status >= 500 and "response_format" in parameters and not loading, loading=loading, **size,
        )  # fmt: skip
    if status in (400, 422) or status == 404 and "parameter" in said.lower():
        explained = change or _TOO_LONG.search(everything) or _KEY.search(everything)
        return Fault("rejected", detail, fatal="user", change=change, unexplained=not explained, **size)
    return Fault("rejected", detail, fatal="user", **size)


_TOO_LONG = re.compile(r"context|too (?:long|large|many tokens)|exceeds? the (?:max|limit)", re.IGNORECASE)
_KEY = re.compile(r"api[ _-]?key|credential|unauthori[sz]ed|authenticat", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"support|unknown|unrecogni[sz]ed|not (?:allowed|permitted|implemented)|unexpected", re.IGNORECASE
)
"""Words for what an endpoint does not know, where its status says only that it failed."""


def is_too_long(detail: str) -> bool:
    """Returns whether an endpoint's words say that the request does not fit its context."""
    return _TOO_LONG.search(detail) is not None


def is_about_the_key(detail: str) -> bool:
    """Returns whether an error says that the endpoint does not take the key."""
    return detail.startswith(("HTTP 401", "HTTP 403")) or detail.startswith("HTTP 400") and bool(_KEY.search(detail))


def _target(url: str, location: str) -> str:
    """Where a redirect leads, without what may be secret in it."""
    parts = urlsplit(urljoin(url, location))
    return shown(f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}", 200)


# --- the endpoint's words -------------------------------------------------------------------------------------

_FIRST = ("message", "msg", "detail", "error", "reason", "raw", "description")
_ECHO = frozenset(("input", "inputs", "messages", "prompt", "body", "request", "user_id", "request_id", "id", "ctx"))
"""Keys under which an endpoint repeats what it was sent, or names the request: no user's text in the events."""


def words(content: Any, parameters: Mapping[str, Any]) -> str:
    """Returns what an error's body says, whatever its shape, in one line; nothing of what the request said to the
    model.
    """
    sent = " ".join(str(message.get("content", "")) for message in parameters.get("messages", ()))
    found: dict[str, None] = {}
    for leaf in _leaves(content, 0):
        line = shown(leaf)
        if line and not _echoes(line, sent) and not any(line in before for before in found):
            found[line] = None
    return shown("; ".join(found), MAX_WORDS)


def _leaves(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        inner = _read(value.encode("utf-8", "replace")) if value[:1] in "[{" else None
        if isinstance(inner, (dict, list)) and depth < 4:  # an upstream's error, quoted whole
            yield from _leaves(inner, depth + 1)
        else:
            yield value
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, (int, float)):
        yield str(value)
    elif depth > 8:
        return
    elif isinstance(value, list):
        for inner in value[:20]:
            yield from _leaves(inner, depth + 1)
    elif isinstance(value, dict):
        names = sorted(value, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        for name in names[:40]:
            number = name in ("code", "status") and isinstance(value[name], (int, float))
            if name.lower() not in _ECHO and not number:
                yield from _leaves(value[name], depth + 1)


def _echoes(line: str, sent: str) -> bool:
    return any(line[at : at + 40] in sent for at in range(0, len(line) - 39, 20))


def _read(body: bytes) -> Any:
    try:
        return strict_json.loads(body)
    except ValueError:
        text = body[:2000].decode("utf-8", "replace")
        return re.sub(r"<[^<>]*>", " ", text)


def _inner(content: Any) -> Mapping[str, Any]:
    if isinstance(content, list) and content:
        content = content[0]
    if isinstance(content, dict):
        return content["error"] if isinstance(content.get("error"), dict) else content
    return {}


def _code(content: Any) -> str:
    value = _inner(content).get("code")
    return value if isinstance(value, str) else ""


_PLACE = re.compile(r"""loc['"]?\s*:\s*[\[(]\s*['"]body['"]\s*,\s*['"](\w+)""")


def _parameter(content: Any) -> str:
    """The parameter that the body marks as the one at fault: `param`, or pydantic's `loc`."""
    value = _inner(content).get("param")
    if isinstance(value, str) and value:
        return value
    try:
        found = _PLACE.search(json.dumps(content)[:20_000])
    except RecursionError:
        return ""
    return found[1] if found else ""


# --- how long to wait -----------------------------------------------------------------------------------------

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = r"[0-9]{1,7}(?:\.[0-9]{1,6})?"
_UNIT = r"(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|h)(?![a-z])"
_PART = re.compile(rf"({_NUMBER})\s*({_UNIT})", re.IGNORECASE)
_WAIT = re.compile(
    r"(?:retry_?delay|retry[_ -]?after|try again|again|retry|wait|reset)[^0-9\n]{0,40}?"
    rf"((?:{_NUMBER}\s*{_UNIT}\s?){{1,3}})", re.IGNORECASE,
)  # fmt: skip
_FIELD = re.compile(rf"""retry_?after(?:_s|_seconds)?["']?\s*:\s*["']?({_NUMBER})["']?\s*[,}}]""", re.IGNORECASE)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `retry-after-ms` or `Retry-After` header (a number or an HTTP date), None without a valid one."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / scale
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def wait_in_words(text: str) -> float | None:
    """Returns the longest wait that an error's words ask for ("try again in 1m20.5s", Google's `retryDelay`, a field
    `retry_after` of seconds), None without.
    """
    spans = [_PART.findall(span) for span in _WAIT.findall(text)]
    waits = [sum(float(number) * _UNITS[_unit(unit)] for number, unit in span) for span in spans]
    return max([*waits, *map(float, _FIELD.findall(text))], default=None)


def _unit(word: str) -> str:
    word = word.lower()
    return "ms" if word in ("ms", "millisecond", "milliseconds") else word[0]
