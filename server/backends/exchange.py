"""Sending messages to hosts and waiting for what they say: with a deadline, a stop event and a heartbeat.

Flower's own `send_and_receive` waits without looking up, so a Ctrl-C would hang; here every wait has an end.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.errors import Failure, ResumableStop, UserError

POLL_S = 0.05
FAILURE, LATE = "Failure", "late"
NOTHING: frozenset[str] = frozenset()
EVERYTHING = frozenset({FAILURE, LATE, "UserError", "ResumableStop"})
"""What of a host may be forgiven: errors by kind, and that it does not answer in time."""

PAUSES_S = (0.5, 2.0, 5.0, 15.0)
"""How long a host that failed inside Flower (a dead actor, which Ray starts again) is left alone before it is asked
once more; after the last one its failure counts. A pass may be run again. A SuperLink that fails is treated alike."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lost:
    """Stands for the reply of a host that is forgiven. `why`: in its words, or Flower's."""

    why: str


def insist(call: Callable[[], T]) -> T:
    """Returns what a call of a grid does. Each may be repeated, and is where the SuperLink fails at it or cannot be
    reached: Flower does so itself for some of these failures.

    Raises ResumableStop where it fails again and again.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return call()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise
            if pause_s is None:
                raise ResumableStop(f"the SuperLink fails or cannot be reached: {error}") from error
            WallClock().sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def nodes(grid: Grid, at_least: int, deadline_s: float, stop: threading.Event) -> list[int]:
    """Returns the node ids, once at least so many are there and no more arrive: nodes register while the server starts.

    Raises ResumableStop when `stop` is set or the deadline passes.
    """
    clock = WallClock()
    end_s = clock.now_s() + deadline_s
    last, steady = -1, 0
    while steady < 3:
        found = sorted(insist(grid.get_node_ids))
        steady = steady + 1 if len(found) == last and len(found) >= at_least else 0
        last = len(found)
        if stop.is_set():
            raise ResumableStop("interrupted")
        if clock.now_s() > end_s:
            raise ResumableStop(f"{last} of {at_least} Flower nodes registered within {deadline_s} s")
        clock.sleep(POLL_S)
    return found


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    deadline_s: float,
    stop: threading.Event,
    heartbeat: Callable[[int], object] = lambda replies: None,
    forgiven: Collection[str] = NOTHING,
) -> list[Message | Lost]:
    """Pushes the messages and returns the replies in the order of the messages.

    `heartbeat` is called at every look, with the number of replies; while what it returns changes, and whenever a reply
    comes, the deadline starts anew. Raises ResumableStop when `stop` is set or the deadline passes, UserError and
    ResumableStop as the hosts say, and Failure with the host's traceback for anything else; what is `forgiven` makes
    the reply a `Lost` instead.
    """
    clock, messages = WallClock(), list(messages)
    end_s = clock.now_s() + deadline_s
    waiting: dict[str, int] = {}
    replies: dict[int, Message] = {}
    left: set[int] = set()

    def push(places: Sequence[int], messages: Sequence[Message]) -> None:
        for name, place in zip(insist(lambda: grid.push_messages(messages)), places, strict=True):
            if name:
                waiting[name] = place
            else:  # its node has left since it was looked for
                left.add(place)

    push(range(len(messages)), messages)
    beat: object = None
    failed = [0] * len(messages)
    later: dict[int, float] = {}
    while waiting or later:
        for reply in insist(lambda: list(grid.pull_messages(list(waiting)))) if waiting else ():
            place, pause_s = waiting.pop(reply.metadata.reply_to_message_id), 0.0
            gone = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
            if reply.has_error() and not gone and failed[place] < len(PAUSES_S):
                pause_s = PAUSES_S[failed[place]]
                later[place] = clock.now_s() + pause_s
                failed[place] += 1
            else:
                replies[place] = reply
            end_s = clock.now_s() + pause_s + deadline_s
        for place in [place for place, at_s in later.items() if at_s <= clock.now_s()]:
            del later[place]
            push([place], [_copy(messages[place])])
        if (now := heartbeat(len(replies))) != beat:
            beat, end_s = now, clock.now_s() + deadline_s
        if stop.is_set():
            raise ResumableStop("interrupted")
        if clock.now_s() > end_s:
            if LATE in forgiven:
                break
            late = f"{len(waiting) + len(later)} of {len(messages)} hosts"
            raise ResumableStop(f"{late} neither answered nor got on within {deadline_s:.0f} s (engine.deadline_s)")
        if waiting or later:
            clock.sleep(POLL_S)
    if left and "ResumableStop" not in forgiven:
        raise ResumableStop(f"{len(left)} of {len(messages)} hosts left while they were addressed")
    away, late = Lost("its node left"), Lost(f"no answer within {deadline_s:.0f} s (engine.deadline_s)")
    return [
        _checked(replies[place], forgiven) if place in replies else away if place in left else late
        for place in range(len(messages))
    ]


def _copy(message: Message) -> Message:
    return Message(
        message.content, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type
    )


_ENDED = re.compile(r"memory|Actor(?:Unavailable|Died)|actor is restarting", re.IGNORECASE)
"""Words for a host's process that was ended and not by what it did."""


def _checked(reply: Message, forgiven: Collection[str]) -> Message | Lost:
    kind, message, trace = FAILURE, "", ""
    if reply.has_error():
        message = f"a host failed inside Flower: {' '.join(str(reply.error.reason).split())}"
        if FAILURE not in forgiven and _ENDED.search(message):
            kind, used = "ResumableStop", 1 - limits.available_bytes() / limits.memory_bytes()
            message = (
                f"a host was ended from outside, as Ray does where memory ran out on this machine ({used:.0%} of it is "
                f"used now; {message[:250]}). End other programs, or take fewer engine.workers; then resume the run"
            )
    elif "error" in reply.content:
        kind, message, trace = (str(reply.content["error"][name]) for name in ("error", "message", "traceback"))
    else:
        return reply
    if kind in forgiven:
        return Lost(message)
    if kind == "UserError":
        raise UserError(message)
    if kind == "ResumableStop":
        raise ResumableStop(message)
    raise Failure(f"{message}\n{trace}".rstrip())
