"""What the asking side keeps of a request to the cloud: the order, every attempt at it, and the reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from untether.sim.core.records import TRANSPORT_OUTCOMES
from untether.sim.prompts.protocol import Pair, Uploaded


class CloudSettings(Protocol):
    """The fields of the experiment's `cloud` section that the client reads."""

    base_url: str
    model: str
    api_key_env: str
    temperature: float
    top_p: float
    max_tokens: int
    structured: bool
    timeout_s: float
    max_retries: int
    concurrency: int
    cache: str


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """One HTTP request's worth of work. `kind` is `samples` (pairs wanted: `count`) or `answer`.

    (seed, device_id, round, purpose) name the draw: two requests that agree in them and in their messages get the same
    answer. `uploaded` is what of the user the messages carry. `temperature` None means the configured one.
    """

    request_id: str
    device_id: str
    task: str
    messages: tuple[dict[str, str], ...]
    purpose: str
    count: int = 0
    seed: int = 0
    round: int = 0
    kind: str = "samples"
    labels: tuple[str, ...] = ()
    uploaded: tuple[Uploaded, ...] = ()
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try. `bytes_*` count the HTTP bodies, None tokens mean that nothing was answered.

    `draw` counts the answers drawn before this one: it enters the sampling seed, so that a transport fault never
    changes what is sampled and a malformed answer is not drawn again. `tokens_estimated` where the endpoint reported
    no usage. `cached`: read from the cache (the numbers are those of when it was paid for).
    """

    attempt: int
    draw: int
    outcome: str
    duration_s: float
    bytes_up: int = 0
    bytes_down: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_estimated: bool = False
    cached: bool = False
    model: str = ""
    fingerprint: str = ""
    finish_reason: str = ""
    detail: str = ""

    @property
    def answered(self) -> bool:
        """Whether the endpoint answered with a completion, good or bad."""
        return self.outcome not in TRANSPORT_OUTCOMES


@dataclass(frozen=True, slots=True)
class CloudReply:
    """What became of a request: `ok`, `refused`, `malformed`, `no_samples`, or on the wall clock a transport outcome.

    `pairs` (at most `count`) for samples, `text` for both. `problems` counts what was wrong in the last answer.
    """

    request_id: str
    outcome: str
    text: str = ""
    pairs: tuple[Pair, ...] = ()
    problems: dict[str, int] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def cached(self) -> bool:
        """Whether nothing was paid for this reply now."""
        return bool(self.attempts) and all(attempt.cached for attempt in self.attempts)

    @property
    def model(self) -> str:
        """The model that wrote the last answer, as the endpoint names it."""
        return next((a.model for a in reversed(self.attempts) if a.answered), "")

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of the last answer (empty if the endpoint gives none)."""
        return next((a.fingerprint for a in reversed(self.attempts) if a.answered), "")

    def total(self, name: str) -> Any:
        """Returns the sum over all attempts of a numeric field of Attempt (None counts 0)."""
        return sum(getattr(attempt, name) or 0 for attempt in self.attempts)
