"""Executors: how a host runs a call on its worker, a Ray actor that may die or, without Ray, this process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from untether.clients.device.worker import Inputs, Outcome, Worker
from untether.clients.hosting.process import Post, WorkerProcess, perform
from untether.sim.core.clock import WallClock
from untether.sim.core.errors import ResumableStop
from untether.sim.rounds.messages import Order
from untether.sim.rounds.work import Work

POLL_S = 1.0
"""How often a host looks whether its worker still gets on with its shard."""

SLOT, REPLACEMENT = 0.99, 0.001
"""What a worker takes of a node's resource `worker`, of which one is offered a worker. One that is beyond what is
offered, and a replacement, take next to nothing: they move in beside another worker instead of waiting for ever."""

PLACED_S = 25.0
"""How long a worker may take to be there before it is placed anew, beside another one; as long again, and it is given
up."""

_ACTORS: dict[str, Any] = {}
"""Those that this process made: Ray ends an actor, and the models in it, with the last handle of its maker."""

LOOKING = "looking"
"""The group of calls that a worker answers while it works."""

_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "failed to allocate", "bad allocation")


VERDICT_S = 120.0
"""How long Ray may take to say what became of a worker that does not answer (a lost node: about 30 s)."""

_NODE_LOST = ("its node has died", "node was terminated")


class WorkerDied(Exception):
    """The worker process ended during an order; its `str` says how.

    Args:
        detail: How it ended.
        outcome: `crashed`, `out_of_memory` or `timeout`.
        with_node: Whether its whole node was lost, which says nothing about the order.
        pressed: Whether it was ended because its machine had no memory left, whoever has it.
    """

    def __init__(self, detail: str, outcome: str = "crashed", with_node: bool = False, pressed: bool = False):
        super().__init__(detail)
        self.outcome, self.with_node, self.pressed = outcome, with_node, pressed


class Executor(Protocol):
    """Makes a worker carry out one order. A dead worker raises WorkerDied and is replaced at the next call."""

    def call(
        self, order: Order, inputs: Inputs, *, deadline_s: float, progress: Callable[[Work], None] = ...
    ) -> Outcome: ...


def _nobody(work: Work) -> None: ...


class InProcess:
    """The executor without Ray: the worker lives in this process (a deployed node)."""

    def __init__(self, make: Callable[[], Worker]):
        self._make, self._worker = make, None

    def call(
        self, order: Order, inputs: Inputs, *, deadline_s: float, progress: Callable[[Work], None] = _nobody
    ) -> Outcome:
        """Calls the worker directly; there is no other process that could die."""
        self._worker = self._worker or self._make()
        return perform(self._worker, order, inputs)


class RayExecutor:
    """Runs calls on a named Ray actor, one for each host and Flower run; a dead one is replaced.

    Any of Flower's actors may call it. Order, inputs and outcome are values of Ray's object store, so the actor may
    live on any node.

    Args:
        name: The actor's name.
        post: What goes with every call: the run and how to work for it.
    """

    NAMESPACE = "untether"

    def __init__(self, name: str, post: Post):
        self.name, self.post = name, post
        self._replacing = False

    def call(
        self, order: Order, inputs: Inputs, *, deadline_s: float, progress: Callable[[Work], None] = _nobody
    ) -> Outcome:
        """Calls the actor and waits while it makes progress; without progress for `deadline_s` it is taken to hang."""
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        killed_before = _oom_kills()
        actor = self._placed()
        try:
            return self._wait(actor, actor.call.remote(self.post, order, inputs), deadline_s, progress)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if not memory_ran_out(cause):
                raise cause from error
            self._kill(actor)  # what it holds is what there is too little of
            raise WorkerDied(f"{type(cause).__name__}: {cause}", "out_of_memory") from error
        except (RayActorError, OutOfMemoryError) as error:
            error = self._verdict(actor, error)
            self._kill(actor)
            detail = " ".join(str(error).split())
            out_of_memory = isinstance(error, OutOfMemoryError) or "OUT_OF_MEMORY" in detail.upper()
            if out_of_memory or _oom_kills() > killed_before:
                raise WorkerDied(detail, "out_of_memory", pressed=True) from error
            raise WorkerDied(detail, with_node=any(sign in detail for sign in _NODE_LOST)) from error
        except TimeoutError as error:
            self._kill(actor)
            raise WorkerDied(str(error), "timeout") from error

    def _wait(self, actor: Any, reply: Any, deadline_s: float, progress: Callable[[Work], None]) -> Outcome:
        """The reply, while the worker gets on; one that does not say anything does not."""
        import ray

        clock = WallClock()
        seen: Work = {}
        since_s = clock.now_s()
        while not ray.wait([reply], timeout=min(POLL_S, deadline_s))[0]:
            now = seen
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                answer = actor.look.options(concurrency_group=LOOKING).remote()
                now = ray.get(answer, timeout=POLL_S)
            if now != seen:
                seen, since_s = now, clock.now_s()
                progress(now)
            elif clock.now_s() - since_s > deadline_s:
                raise TimeoutError(f"no progress for {deadline_s:.0f} s (engine.deadline_s)")
        return ray.get(reply)

    def _verdict(self, actor: Any, error: Exception) -> Exception:
        """What Ray knows in the end of a worker that does not answer: its node may be gone. Until Ray knows, it would
        start a replacement on that very node.
        """
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        clock = WallClock()
        end_s = clock.now_s() + VERDICT_S
        while isinstance(error, ActorUnavailableError) and clock.now_s() < end_s:
            clock.sleep(POLL_S)
            try:
                ray.get(actor.pid.remote(), timeout=POLL_S)
                break  # it is there again, but its reply is lost
            except ray.exceptions.GetTimeoutError:
                continue
            except RayError as later:
                error = later
        return error

    def _kill(self, actor: Any) -> None:
        """Ends the actor and waits until its name is free, so that the next call does not find the dead one."""
        import ray

        self._replacing = True
        ray.kill(actor, no_restart=True)
        clock = WallClock()
        for _ in range(100):
            try:
                ray.get_actor(self.name, self.NAMESPACE)
            except ValueError:
                return
            clock.sleep(0.05)

    def _placed(self) -> Any:
        """The actor, once it runs (or has died, which its call tells). Raises ResumableStop where no node takes it."""
        import ray

        for _ in range(2):
            actor = self._actor()
            there = actor.look.options(concurrency_group=LOOKING).remote()  # answered by one that works, too
            if ray.wait([there], timeout=PLACED_S)[0]:
                return actor
            free = ray.available_resources().get("worker", 0.0)
            if self._replacing and free >= REPLACEMENT:
                return actor  # there is room: this machine is slow
            self._kill(actor)
        offered = ray.cluster_resources().get("worker", 0.0)
        raise ResumableStop(
            f"worker {self.post.number} was placed on no node within {2 * PLACED_S:.0f} s: {offered:g} of the resource "
            f"`worker` are offered and {free:g} are free. Offer more when a node starts, or take fewer hosts "
            "(engine.hosts); then resume the run"
        )

    def _actor(self) -> Any:
        """The actor, made where there is none. Ray ends it with the run that made it, however that run ends."""
        import ray

        try:
            return ray.get_actor(self.name, self.NAMESPACE)
        except ValueError:
            pass
        offered = ray.cluster_resources().get("worker", 0)
        # By its number, not by what is free: what others have just taken is told late, and nothing else may take it.
        share = REPLACEMENT if self._replacing or self.post.number >= int(offered) else SLOT
        _ACTORS[self.name] = ray.remote(concurrency_groups={LOOKING: 1})(WorkerProcess).options(
            name=self.name, namespace=self.NAMESPACE, get_if_exists=True, num_cpus=0, num_gpus=0, max_restarts=0,
            max_concurrency=1, resources={"worker": share} if offered else None, scheduling_strategy="SPREAD",
        ).remote()
        return _ACTORS[self.name]


def memory_ran_out(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out, recognised without torch: a host does not import it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _MEMORY)


def _oom_kills() -> int:
    """Processes that this machine's kernel has ended for want of memory (0 where it does not say)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
