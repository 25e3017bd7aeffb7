"""Asks the cloud, really, over HTTP: many requests at once within a bound, every attempt counted, nothing paid twice.

The `openai` client does the wire; its own retries are off, because here each attempt is an event with an outcome, and
because whether a retry is a new draw or the same one decides whether a run can be repeated.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from untether.clients.cloud.answer import CloudAnswer, Unusable, read_answer, split_thought, unwrapped
from untether.clients.cloud.answer_cache import AnswerCache, cache_key
from untether.clients.cloud.dialect import Dialect
from untether.clients.cloud.faults import Fault, classify, is_about_the_key, is_too_long
from untether.clients.cloud.journal import Journal
from untether.clients.cloud.records import Attempt, CloudReply, CloudRequest, CloudSettings
from untether.clients.cloud.wire import http_client, loop_factory
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.records import CUT, TRANSPORT_OUTCOMES
from untether.sim.core.seeding import derive
from untether.sim.core.text import plain, shown
from untether.sim.experiment.endpoint import check_address
from untether.sim.experiment.models.recording import request_key
from untether.sim.prompts.protocol import ParsedSamples, estimate_tokens, parse_samples, response_format

MAX_BACKOFF_S = 30.0

OnReply = Callable[[CloudReply], None]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What came of one attempt: an answer, perhaps an unusable one, or a fault."""

    parameters: dict[str, Any]
    begun: float
    sizes: tuple[int, int]
    answer: CloudAnswer | None = None
    unusable: str = ""
    fault: Fault | None = None


class CloudClient:
    """The asking side of one endpoint.

    `base_url`, `model`, `cache` and `api_key` (empty: send none) replace the configured ones and the environment's, as
    for a gateway that the run itself serves. `variant` is whatever else decides the answers (such a gateway's
    fingerprint) and enters the cache's key. With `wall=False` (virtual time) a transport fault that outlives its
    retries raises ResumableStop; with `wall=True` it is the reply's outcome. `backoff_s` is the first retry's wait,
    `max_wait_s` the longest `Retry-After` that is obeyed. `journal` is told of each attempt before it is made.
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
        journal: Journal | None = None,
    ) -> None:
        self.config = config
        self.base_url = base_url or config.base_url
        self.model = model or config.model
        self.variant = variant
        self.wall = wall
        self.backoff_s = backoff_s
        self.max_wait_s = max_wait_s
        self.dialect = Dialect()
        """What of a request this endpoint takes, as far as it is known."""
        self._journal = journal
        self._cache_path = str(cache if cache is not None else config.cache)
        self._cache: AnswerCache | None = None
        self._not_before = 0.0
        self._loading_since: float | None = None
        self._trials = asyncio.Lock()
        self._key = os.environ.get(config.api_key_env, "").strip() if api_key is None else api_key
        check_address(self.base_url, config.api_key_env, self._key)
        if not self._key.isascii() or not self._key.isprintable():
            raise UserError(f"the key in the environment variable {config.api_key_env} has characters no key can have")

    async def ask(
        self,
        requests: Sequence[CloudRequest],
        on_done: OnReply | None = None,
        stop: threading.Event | None = None,
    ) -> list[CloudReply]:
        """Asks for all, at most `concurrency` at once, begun in the order given; the replies come in that order.

        `on_done` is called with each reply as it arrives. Setting `stop` ends it with ResumableStop. Raises UserError
        where the endpoint refuses the key, the model or the request, ResumableStop as the class says; answers that
        arrived before are in the cache, if there is one.
        """
        replies: list[CloudReply | None] = [None] * len(requests)
        waiting = deque(enumerate(requests))
        http = http_client(self.base_url, self.config.max_tokens)
        if self._cache_path:
            self._cache = AnswerCache(self._cache_path, own=not self.config.cache)
            [known] = self._cache.several([self._dialect_key])
            self.dialect = Dialect([*self.dialect.told, *(known or {}).get("changes", ())])
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
        on_done: OnReply | None = None,
        stop: threading.Event | None = None,
    ) -> list[CloudReply]:
        """Runs `ask` for callers without an event loop of their own."""
        if not requests:
            return []
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(self.ask(requests, on_done, stop))

    async def _one(self, client: openai.AsyncOpenAI, request: CloudRequest) -> CloudReply:
        attempts: list[Attempt] = []
        draw = 0
        for kept in self._kept(request):  # draws that were paid for before, in their order
            try:
                answer = CloudAnswer(**{**kept["answer"], "text": plain(kept["answer"]["text"])})
                paid = Attempt(**kept["attempt"])
            except (TypeError, KeyError, AttributeError):
                break  # no answer of ours: it is asked for
            reply = self._judge(request, answer)
            attempts.append(replace(paid, attempt=len(attempts), draw=draw, cached=True, duration_s=0.0))
            reply = replace(reply, attempts=tuple(attempts))
            if self._is_last(reply, answer, draw):
                return reply
            draw += 1
        also: tuple[str, ...] = ()
        while True:
            await self._wait_for_gate()
            told = self.dialect.told
            sent = await self._send(client, request, draw, also)
            if sent.fault is not None and sent.fault.fatal and sent.fault.unexplained:
                attempts.append(self._failed(len(attempts), draw, sent))
                found = await self._try_without(client, request, draw, sent, told, attempts)
                if found is None:
                    continue
                sent = found
            if sent.answer is None:
                fault = sent.fault
                assert fault is not None
                attempts.append(self._failed(len(attempts), draw, sent))
                if fault.change:
                    self._learn([fault.change], sent.parameters, fault.detail)
                    continue
                if fault.outcome == "refused":
                    refused = CloudAnswer("", refusal=attempts[-1].detail or "refused")
                    self._keep(request, draw, refused, attempts[-1])
                    return CloudReply(request.request_id, "refused", attempts=tuple(attempts))
                errors = sum(attempt.outcome == "server_error" for attempt in attempts)
                only_chance = fault.unexplained and not also and self.config.max_retries == 0
                if not only_chance and not await self._survive(fault, request, attempts):
                    return CloudReply(request.request_id, fault.outcome, attempts=tuple(attempts))
                last = errors >= min(2, self.config.max_retries)
                also = ("response_format",) if fault.unexplained and last else ()
                continue
            self._learn(also, sent.parameters)
            reply = self._judge(request, sent.answer)
            if sent.unusable:
                reply = replace(reply, problems={**reply.problems, "unusable": 1})
            attempts.append(_answered(len(attempts), draw, reply, sent))
            reply = replace(reply, attempts=tuple(attempts))
            self._keep(request, draw, sent.answer, attempts[-1])
            if self._is_last(reply, sent.answer, draw):
                return reply
            draw += 1
            also = ()

    def _is_last(self, reply: CloudReply, answer: CloudAnswer, draw: int) -> bool:
        """Whether another draw is worth nothing: this one can be used, or the next one would be cut as it was."""
        return reply.outcome != "malformed" or draw >= self.config.max_retries or answer.cut_before_it_began

    async def _send(
        self, client: openai.AsyncOpenAI, request: CloudRequest, draw: int, also: Sequence[str] = ()
    ) -> _Sent:
        """One attempt, with changes on trial beside those that this endpoint is known to need."""
        parameters = self.dialect.spoken(self._parameters(request, draw), also)
        if self._journal is not None:
            self._journal.note(request, draw, urlsplit(self.base_url).netloc)
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                raw = await client.chat.completions.with_raw_response.create(**parameters)
                body = await raw.http_response.aread()
            sizes = len(raw.http_request.content), len(body)
            try:
                return _Sent(parameters, begun, sizes, answer=read_answer(body))
            except Unusable as error:
                return _Sent(parameters, begun, sizes, answer=CloudAnswer(""), unusable=str(error))
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            for found in (error, error.__cause__):
                if isinstance(found, Unusable):
                    return _Sent(parameters, begun, (0, 0), answer=CloudAnswer(""), unusable=str(found))
            fault = classify(error, parameters)
            return _Sent(parameters, begun, (fault.bytes_up, fault.bytes_down), fault=fault)

    async def _try_without(
        self, client: openai.AsyncOpenAI, request: CloudRequest, draw: int, refused: _Sent, told: Sequence[str],
        attempts: list[Attempt],
    ) -> _Sent | None:  # fmt: skip
        """Leave out what may be unknown to an endpoint that does not say what it refuses: one at a time, then all.

        Returns the attempt that went through; None to ask again as before, because something was learned meanwhile.
        Raises UserError, with what the endpoint said first, where nothing helps.
        """
        async with self._trials:
            if self.dialect.told != told:
                return None
            names = self.dialect.candidates(self._parameters(request, draw))
            names = [name for name in names if name not in self.dialect.changes]
            for also in (*((name,) for name in names), tuple(names)):
                while True:
                    sent = await self._send(client, request, draw, also)
                    if sent.fault is None or sent.fault.outcome == "rejected":
                        break
                    attempts.append(self._failed(len(attempts), draw, sent))
                    if not await self._survive(sent.fault, request, attempts):
                        return None
                if sent.fault is None:
                    self._learn(also, sent.parameters)
                    return sent
                attempts.append(self._failed(len(attempts), draw, sent))
                if sent.fault.change:
                    self._learn([*also, sent.fault.change], sent.parameters, sent.fault.detail)
                    return None
            assert refused.fault is not None
            raise UserError(self._explain(self._redact(refused.fault.detail)))

    def _learn(self, changes: Sequence[str], parameters: Mapping[str, Any], text: str = "") -> None:
        """Heed changes from now on, and in later passes of the run too."""
        for change in changes:
            self.dialect.learn(change, parameters, text)
        if changes and self._cache is not None:
            self._cache.replace(self._dialect_key, {"changes": self.dialect.told})

    @property
    def left_out(self) -> set[str]:
        """Request parameters that this endpoint refused and that are no longer sent."""
        return set(self.dialect.changes)

    @property
    def _dialect_key(self) -> str:
        return cache_key(dialect_of=[self.base_url, self.model])

    def _parameters(self, request: CloudRequest, draw: int) -> dict[str, Any]:
        config = self.config
        parameters: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": config.temperature if request.temperature is None else request.temperature,
            "max_tokens": config.max_tokens,
            "seed": _seed(request, draw),
        }
        if config.top_p < 1:  # 1 is everybody's default, and some take either this or temperature
            parameters["top_p"] = config.top_p
        if config.structured and request.kind == "samples":
            parameters["response_format"] = response_format(request.labels)
        return parameters

    def _judge(self, request: CloudRequest, answer: CloudAnswer) -> CloudReply:
        answer = split_thought(answer)
        if answer.refusal or answer.finish_reason == "content_filter":
            return CloudReply(request.request_id, "refused", answer.refusal or answer.text)
        if request.kind == "answer":
            text = unwrapped(answer.text)
            return CloudReply(request.request_id, "ok" if text else "malformed", text)
        text = answer.text
        parsed: ParsedSamples = parse_samples(text)
        if parsed.pairs:
            return CloudReply(request.request_id, "ok", text, parsed.pairs[: request.count], parsed.problems)
        outcome = "malformed" if "not_strict_json" in parsed.problems else "no_samples"
        return CloudReply(request.request_id, outcome, text, (), parsed.problems)

    def _failed(self, number: int, draw: int, sent: _Sent) -> Attempt:
        fault = sent.fault
        assert fault is not None
        duration_s = time.perf_counter() - sent.begun
        otherwise = "as a stream" if fault.change == "stream" else f"without {fault.change}"
        detail = self._redact(fault.detail) + (f" (then {otherwise})" if fault.change else "")
        return Attempt(number, draw, fault.outcome, duration_s, fault.bytes_up, fault.bytes_down, detail=detail)

    async def _survive(self, fault: Fault, request: CloudRequest, attempts: list[Attempt]) -> bool:
        """Wait for the next attempt (True), or end it: the user's error, a resumable stop, or an outcome (False)."""
        detail = self._redact(fault.detail)
        if fault.fatal == "user":
            raise UserError(self._explain(detail))
        wait_s = fault.retry_after_s
        if fault.loading and await self._is_loading(wait_s):
            return True
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

    async def _is_loading(self, wait_s: float | None) -> bool:
        """Wait for an endpoint that still loads its model, as long as patience goes; that is no failure of the wire."""
        now = asyncio.get_running_loop().time()
        self._loading_since = now if self._loading_since is None else self._loading_since
        if now - self._loading_since > self.max_wait_s:
            return False
        await asyncio.sleep(min(self.backoff_s * 4 if wait_s is None else wait_s, self.max_wait_s))
        return True

    def _explain(self, detail: str) -> str:
        variable = self.config.api_key_env
        where = f"the cloud at cloud.base_url = {self.base_url}"
        if is_about_the_key(detail):
            key = f"the key in the environment variable {variable} (cloud.api_key_env)" if self._key else (
                f"a request without a key: the environment variable {variable} (cloud.api_key_env) is not set"
            )  # fmt: skip
            return f"{where} refuses {key}: {detail}. Set {variable} to a key that this endpoint accepts"
        if detail.startswith("HTTP 404"):
            return (
                f"{where} does not have cloud.model = {self.model!r}: {detail}. "
                "Check the model's name, and that base_url ends where the API begins (often /v1)"
            )
        said = f"{where} rejects the request for cloud.model = {self.model!r}: {detail}"
        if is_too_long(detail):
            return f"{said}. Lower cloud.show_items, cloud.show_chars or cloud.max_tokens, or serve a longer context"
        return said

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

    def _keep(self, request: CloudRequest, draw: int, answer: CloudAnswer, attempt: Attempt) -> None:
        """Keep an answer, good or bad: it was paid for. (Faults of the wire are not its history.)"""
        if self._cache is not None:
            said = {name: getattr(answer, name) for name in ("text", "refusal", "finish_reason", "thought")}
            config = self.config
            temperature = config.temperature if request.temperature is None else request.temperature
            sampling = temperature, config.top_p, config.max_tokens, _seed(request, draw)
            kept = {"answer": said, "attempt": asdict(attempt), "request": request_key(request.messages, *sampling)}
            self._cache.put(self._cache_keys(request)[draw], kept)


def _seed(request: CloudRequest, draw: int) -> int:
    """The sampling seed that the endpoint is told: some take 32 bits only."""
    return derive(request.seed, request.device_id, request.round, request.purpose, draw) & 0x7FFFFFFF


def _answered(number: int, draw: int, reply: CloudReply, sent: _Sent) -> Attempt:
    answer = sent.answer
    assert answer is not None
    notes = [f"{name}={count}" for name, count in sorted(reply.problems.items())]
    if answer.finish_reason == "length":
        notes.insert(0, "finish_reason=length")
    if answer.note:
        notes.insert(0, answer.note)
    if answer.cut_before_it_began:
        spent = "its reasoning took" if answer.thought else "were spent on"
        notes.append(f"{CUT}: {spent} all of cloud.max_tokens")
    elif reply.outcome == "malformed" and not answer.text.strip() and not sent.unusable:
        notes.append("an empty answer" + (", beside its reasoning" if answer.thought else ""))
    if sent.unusable:
        notes.append(shown(sent.unusable, 200))
    tokens_in, tokens_out = answer.tokens_in, answer.tokens_out
    estimated = tokens_in is None or tokens_out is None
    if estimated:
        tokens_in = sum(estimate_tokens(message["content"]) for message in sent.parameters["messages"])
        tokens_out = estimate_tokens(answer.text)
    return Attempt(
        attempt=number,
        draw=draw,
        outcome=reply.outcome,
        duration_s=time.perf_counter() - sent.begun,
        bytes_up=sent.sizes[0],
        bytes_down=sent.sizes[1],
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tokens_estimated=estimated,
        model=answer.model,
        fingerprint=answer.fingerprint,
        finish_reason=answer.finish_reason,
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
