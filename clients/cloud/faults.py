"""What an error of the endpoint means: try again, try again without a parameter, an outcome, or the user's mistake."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass

import openai


@dataclass(frozen=True, slots=True)
class Fault:
    """An attempt that brought no completion.

    `outcome` as in Attempt. `retry_after_s` is what the endpoint asked for. `fatal` says why no retry can help
    (`user`: a setting is wrong; `stop`: the endpoint will not serve us now). `without` names a request parameter that
    the endpoint seems not to know.
    """

    outcome: str
    detail: str
    retry_after_s: float | None = None
    fatal: str = ""
    without: str = ""
    bytes_up: int = 0
    bytes_down: int = 0


def classify(error: Exception, parameters: Mapping[str, object]) -> Fault:
    """The fault behind an exception of the openai client; `parameters` are those of the request that met it."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("timeout", "no answer within cloud.timeout_s")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        name = type(cause).__name__ if cause is not None else ""
        outcome = "unreachable" if name in {"ConnectError", "ConnectTimeout"} else "dropped"
        return Fault(outcome, f"{name}: {cause}" if cause is not None else str(error))
    if isinstance(error, openai.APIStatusError):
        return _status(error, parameters)
    if isinstance(error, openai.OpenAIError | ValueError):
        return Fault("not_an_answer", f"{type(error).__name__}: {error}")
    raise error


def _status(error: openai.APIStatusError, parameters: Mapping[str, object]) -> Fault:
    status, detail = error.status_code, f"HTTP {error.status_code}: {_first_line(error.message)}"
    code = error.code or ""
    sizes = {"bytes_up": len(error.request.content), "bytes_down": len(error.response.content)}
    if status == 429:
        fatal = "stop" if code == "insufficient_quota" else ""
        return Fault("rate_limited", detail, retry_after_s(error.response.headers), fatal, **sizes)
    if status in (408, 409, 425) or status >= 500:
        return Fault("server_error", detail, retry_after_s(error.response.headers), **sizes)
    if code in ("content_filter", "content_policy_violation"):
        return Fault("refused", detail, **sizes)
    if status in (400, 422):
        return Fault("rejected", detail, fatal="user", without=_unknown_parameter(error, parameters), **sizes)
    return Fault("rejected", detail, fatal="user", **sizes)


def _unknown_parameter(error: openai.APIStatusError, parameters: Mapping[str, object]) -> str:
    """The parameter to leave out: the one the error names, or `response_format`, by far the likeliest."""
    named = f"{error.param or ''} {error.message}".lower()
    if "max_completion_tokens" in named and "max_tokens" in parameters:
        return "max_tokens"
    if "seed" in (error.param or "").lower() and "seed" in parameters:
        return "seed"
    if "context length" in named or "context_length" in (error.code or ""):
        return ""
    return "response_format" if "response_format" in parameters else ""


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
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _first_line(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + "..."
