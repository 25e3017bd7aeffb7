"""Asks the cloud, really, over HTTP: many requests at once within a bound, every attempt counted, nothing paid twice.

The `openai` client does the wire; its own retries are off, because here each attempt is an event with an outcome, and
because whether a retry is a new draw or the same one decides whether a run can be repeated.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from untether.clients.cloud.answer_cache import AnswerCache, cache_key
from untether.clients.cloud.faults import Fault, classify
from untether.clients.cloud.records import TRANSPORT_OUTCOMES, Attempt, CloudReply, CloudRequest, CloudSettings
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.seeding import derive
from untether.sim.prompts.protocol import ParsedSamples, estimate_tokens, parse_samples, response_format

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
MAX_BACKOFF_S = 30.0

Progress = Callable[[CloudReply], None]


class CloudClient:
    """The asking side of one endpoint.

    `base_url`, `model`, `cache` and `api_key` (empty: send none) replace the configured ones and the environment's, as
    for a gateway that the run itself serves. `variant` is whatever else decides the answers (such a gateway's
    fingerprint) and enters the cache's key. With `wall=False` (virtual time) a transport fault that outlives its
    retries raises ResumableStop; with `wall=True` it is the reply's outcome. `backoff_s` is the first retry's wait,
    `max_wait_s` the longest `Retry-After` that is obeyed.
    """

    def __init__(
        self,
        config: CloudSettings,
        *,
        base_url: str = "",
        model: str = "",
        variant: str = "",
        cache: str | Path | None = None,
        api_key: str | None = None,
        wall: bool = False,
        backoff_s: float = 0.5,
        max_wait_s: float = 120.0,
    ) -> None:
        self.config = config
        self.base_url = base_url or config.base_url
        self.model = model or config.model
        self.variant = variant
        self.wall = wall
        self.backoff_s = backoff_s
        self.max_wait_s = max_wait_s
        self.left_out: set[str] = set()
        """Request parameters that this endpoint refused and that are no longer sent."""
        self._cache_path = str(cache if cache is not None else config.cache)
        self._cache: AnswerCache | None = None
        self._not_before = 0.0
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(
                f"cloud.base_url = {self.base_url!r} is no address: it must be like https://api.example.com/v1"
            )
        self._loopback = url.hostname in _LOOPBACK or url.hostname.startswith("127.")
        self._key = os.environ.get(config.api_key_env, "").strip() if api_key is None else api_key
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"the key in the environment variable {config.api_key_env} has characters no key can have")

    async def ask(
        self,
        requests: Sequence[CloudRequest],
        on_done: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> list[CloudReply]:
        """Ask for all, at most `concurrency` at once, begun in the order given; the replies come in that order.

        `on_done` is called with each reply as it arrives. Setting `stop` ends it with ResumableStop. Raises UserError
        where the endpoint refuses the key, the model or the request, ResumableStop as the class says; answers that
        arrived before are in the cache, if there is one.
        """
        replies: list[CloudReply | None] = [None] * len(requests)
        waiting = deque(enumerate(requests))
        http = openai.DefaultAsyncHttpxClient(trust_env=not self._loopback)
        if self._cache_path:
            self._cache = AnswerCache(self._cache_path)
        try:
            async with openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self._key or "none",
                max_retries=0,
                timeout=self.config.timeout_s,
                http_client=http,
            ) as client:

                async def work() -> None:
                    while waiting:
                        index, request = waiting.popleft()
                        replies[index] = reply = await self._one(client, request)
                        if on_done is not None:
                            on_done(reply)

                count = min(max(self.config.concurrency, 1), len(requests))
                await _all_or_first_error([work() for _ in range(count)], stop)
        finally:
            if self._cache is not None:
                self._cache.close()
                self._cache = None
        return [reply for reply in replies if reply is not None]

    def ask_sync(
        self,
        requests: Sequence[CloudRequest],
        on_done: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> list[CloudReply]:
        """`ask` for callers without an event loop of their own."""
        if not requests:
            return []
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(self.ask(requests, on_done, stop))

    async def _one(self, client: openai.AsyncOpenAI, request: CloudRequest) -> CloudReply:
        attempts: list[Attempt] = []
        draw = 0
        for kept in self._kept(request):  # draws that were paid for before, in their order
            reply = self._judge(request, kept["answer"])
            paid = Attempt(**kept["attempt"])
            attempts.append(replace(paid, attempt=len(attempts), draw=draw, cached=True, duration_s=0.0))
            reply = replace(reply, attempts=tuple(attempts))
            if reply.outcome != "malformed" or draw >= self.config.max_retries:
                return reply
            draw += 1
        while True:
            await self._wait_for_gate()
            parameters = self._parameters(request, draw)
            begun = time.perf_counter()
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    raw = await client.chat.completions.with_raw_response.create(**parameters)
                answer = _read_answer(raw.content)
            except (openai.OpenAIError, TimeoutError, ValueError) as error:
                fault = classify(error, parameters)
                attempts.append(self._failed(len(attempts), draw, begun, fault))
                if fault.without:
                    self.left_out.add(fault.without)
                    continue
                if fault.outcome == "refused":
                    answer = {"text": "", "refusal": attempts[-1].detail or "refused", "finish_reason": ""}
                    self._keep(request, draw, answer, attempts[-1])
                    return CloudReply(request.request_id, "refused", attempts=tuple(attempts))
                if not await self._survive(fault, request, attempts):
                    return CloudReply(request.request_id, fault.outcome, attempts=tuple(attempts))
                continue
            reply = self._judge(request, answer)
            sizes = len(raw.http_request.content), len(raw.content)
            attempts.append(_answered(len(attempts), draw, reply, answer, parameters, begun, sizes))
            reply = replace(reply, attempts=tuple(attempts))
            self._keep(request, draw, answer, attempts[-1])
            if reply.outcome != "malformed" or draw >= self.config.max_retries:
                return reply
            draw += 1

    def _parameters(self, request: CloudRequest, draw: int) -> dict[str, Any]:
        config = self.config
        temperature = config.temperature if request.temperature is None else request.temperature
        parameters: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": temperature,
            "top_p": config.top_p,
        }
        parameters["max_completion_tokens" if "max_tokens" in self.left_out else "max_tokens"] = config.max_tokens
        if "seed" not in self.left_out:
            words = (request.device_id, request.round, request.purpose, draw)
            parameters["seed"] = derive(request.seed, *words) & 0x7FFFFFFF  # some endpoints take 32 bits only
        if config.structured and request.kind == "samples" and "response_format" not in self.left_out:
            parameters["response_format"] = response_format(request.labels)
        return parameters

    def _judge(self, request: CloudRequest, answer: dict[str, Any]) -> CloudReply:
        if answer["refusal"] or answer["finish_reason"] == "content_filter":
            return CloudReply(request.request_id, "refused", answer["refusal"] or answer["text"])
        text = answer["text"]
        if request.kind == "answer":
            return CloudReply(request.request_id, "ok" if text.strip() else "malformed", text.strip())
        parsed: ParsedSamples = parse_samples(text)
        if parsed.pairs:
            return CloudReply(request.request_id, "ok", text, parsed.pairs[: request.count], parsed.problems)
        outcome = "malformed" if "not_strict_json" in parsed.problems else "no_samples"
        return CloudReply(request.request_id, outcome, text, (), parsed.problems)

    def _failed(self, number: int, draw: int, begun: float, fault: Fault) -> Attempt:
        duration_s = time.perf_counter() - begun
        detail = self._redact(fault.detail)
        return Attempt(number, draw, fault.outcome, duration_s, fault.bytes_up, fault.bytes_down, detail=detail)

    async def _survive(self, fault: Fault, request: CloudRequest, attempts: list[Attempt]) -> bool:
        """Wait for the next attempt (True), or end it: the user's error, a resumable stop, or an outcome (False)."""
        detail = self._redact(fault.detail)
        if fault.fatal == "user":
            raise UserError(self._explain(detail))
        wait_s = fault.retry_after_s
        patient = wait_s is None or wait_s <= self.max_wait_s
        if fault.fatal or self._spent(attempts) or not patient:
            if self.wall:
                return False
            asked = "" if patient else f" and asks to wait {wait_s:.0f} s"
            hint = " Is cloud.base_url complete, such as .../v1?" if fault.outcome == "not_an_answer" else ""
            raise ResumableStop(
                f"the cloud at {self.base_url} does not serve ({fault.outcome} after {len(attempts)} attempts{asked}): "
                f"{detail}.{hint} What was answered is kept"
            )
        if wait_s is not None:  # the endpoint means all of us
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + wait_s)
        jitter = (
            derive(request.seed, request.device_id, request.round, request.purpose, len(attempts), "backoff") / 2**63
        )
        backoff_s = min(MAX_BACKOFF_S, self.backoff_s * 2 ** (len(attempts) - 1)) * (0.5 + 0.5 * jitter)
        await asyncio.sleep(backoff_s if wait_s is None else max(wait_s, 0.0))
        return True

    def _explain(self, detail: str) -> str:
        variable = self.config.api_key_env
        where = f"the cloud at cloud.base_url = {self.base_url}"
        if detail.startswith(("HTTP 401", "HTTP 403")):
            key = f"the key in the environment variable {variable} (cloud.api_key_env)" if self._key else (
                f"a request without a key: the environment variable {variable} (cloud.api_key_env) is not set"
            )  # fmt: skip
            return f"{where} refuses {key}: {detail}. Set {variable} to a key that this endpoint accepts"
        if detail.startswith("HTTP 404"):
            return (
                f"{where} does not have cloud.model = {self.model!r}: {detail}. "
                "Check the model's name, and that base_url ends where the API begins (often /v1)"
            )
        return f"{where} rejects the request for cloud.model = {self.model!r}: {detail}"

    async def _wait_for_gate(self) -> None:
        while (left_s := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left_s)

    def _spent(self, attempts: Sequence[Attempt]) -> bool:
        """Whether the wire has failed too often. Answers do not count: what is drawn must not depend on the wire."""
        return sum(attempt.outcome in TRANSPORT_OUTCOMES for attempt in attempts) > self.config.max_retries

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= 4 else text

    def _cache_keys(self, request: CloudRequest) -> list[str]:
        """The keys of all draws a request may come to, in their order."""
        config = self.config
        temperature = config.temperature if request.temperature is None else request.temperature
        content = {
            "messages": request.messages,
            "model": self.model,
            "variant": self.variant,
            "sampling": [temperature, config.top_p, config.max_tokens, config.structured],
            "labels": request.labels,
            "kind": request.kind,
            "draw_of": [request.seed, request.device_id, request.round, request.purpose],
        }
        return [cache_key(**content, one_draw=draw) for draw in range(config.max_retries + 1)]

    def _kept(self, request: CloudRequest) -> list[dict[str, Any]]:
        """What the first draws of a request were answered, good or bad, as far as they are known without a gap."""
        found = self._cache.several(self._cache_keys(request)) if self._cache is not None else []
        return list(takewhile(lambda kept: kept is not None, found))

    def _keep(self, request: CloudRequest, draw: int, answer: Mapping[str, Any], attempt: Attempt) -> None:
        """Keep an answer, good or bad: it was paid for. (Faults of the wire are not its history.)"""
        if self._cache is not None:
            said = {name: answer[name] for name in ("text", "refusal", "finish_reason")}
            self._cache.put(self._cache_keys(request)[draw], {"answer": said, "attempt": asdict(attempt)})


def _read_answer(body: bytes) -> dict[str, Any]:
    """The parts of a chat completion that matter; ValueError for a body that is none (an error page, say)."""
    try:
        whole = json.loads(body)
        choice = whole["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content)
        usage = whole.get("usage") or {}
        return {
            "text": str(content),
            "refusal": message.get("refusal"),
            "finish_reason": str(choice.get("finish_reason") or ""),
            "model": str(whole.get("model") or ""),
            "fingerprint": str(whole.get("system_fingerprint") or ""),
            "tokens_in": usage.get("prompt_tokens"),
            "tokens_out": usage.get("completion_tokens"),
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        start = body[:80].decode(errors="replace")
        raise ValueError(f"the body is no chat completion but begins with {start!r}") from error


def _answered(
    number: int,
    draw: int,
    reply: CloudReply,
    answer: dict[str, Any],
    parameters: dict[str, Any],
    begun: float,
    sizes: tuple[int, int],
) -> Attempt:
    notes = [f"{name}={count}" for name, count in sorted(reply.problems.items())]
    if answer["finish_reason"] == "length":
        notes.insert(0, "finish_reason=length")
    tokens_in, tokens_out = answer["tokens_in"], answer["tokens_out"]
    estimated = not isinstance(tokens_in, int) or not isinstance(tokens_out, int)
    if estimated:
        tokens_in = sum(estimate_tokens(message["content"]) for message in parameters["messages"])
        tokens_out = estimate_tokens(answer["text"])
    return Attempt(
        attempt=number,
        draw=draw,
        outcome=reply.outcome,
        duration_s=time.perf_counter() - begun,
        bytes_up=sizes[0],
        bytes_down=sizes[1],
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tokens_estimated=estimated,
        model=answer["model"],
        fingerprint=answer["fingerprint"],
        finish_reason=answer["finish_reason"],
        detail=" ".join(notes),
    )


async def _all_or_first_error(work: Sequence[Any], stop: threading.Event | None) -> None:
    """Run all; the first error, or `stop`, cancels the rest and is raised."""
    tasks = {asyncio.ensure_future(one) for one in work}
    pending = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=None if stop is None else 0.2, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            if stop is not None and stop.is_set() and pending:
                raise ResumableStop("stopped while asking the cloud; what was answered is kept")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop
