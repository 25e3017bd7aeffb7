"""Time as it is: the timeline of devices that are real, where nothing is simulated. Seconds are counted from the run's
beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from untether.sim.core.clock import WallClock
from untether.sim.core.records import TRANSPORT_OUTCOMES
from untether.sim.experiment import Experiment
from untether.sim.time.asking import Ask, Final, Size, VirtualAttempt
from untether.sim.time.network.transfers import Carried
from untether.sim.time.timeline import Delivery, Plan, Schedule, Timeline, nobody
from untether.sim.time.timeline_state import State, TrainedVersion, VirtualWork


def timeline_of(
    experiment: Experiment, seed: int, device_id: Callable[[int], str], state: Mapping[str, Any] | None = None
) -> Timeline:
    """Returns the time of a seed's devices: as `hardware.clock` says, simulated or real."""
    kind = WallTimeline if experiment.hardware.clock == "wall" else Timeline
    return kind(experiment, seed, device_id, state)


class WallTimeline(Timeline):
    """The timeline of deployed devices: requests are made when they are due, their outcome is what became of them, and
    an adapter answers as soon as it is trained. See `Timeline`.
    """

    real = True

    def __init__(
        self, experiment: Experiment, seed: int, device_id: Callable[[int], str], state: Mapping[str, Any] | None = None
    ):
        super().__init__(experiment, seed, device_id, state)
        self._began_s = float((state or {}).get("began_s") or WallClock().epoch_s())

    def now_s(self) -> float:
        """Returns the seconds since the run began."""
        return WallClock().epoch_s() - self._began_s

    def plan(self, round: int, asks: Sequence[Ask], told: Callable[[int], None] = nobody) -> Plan:
        """Grants every request."""
        now_s = self.now_s()
        finals = {a.request_id: Final(a.request_id, a.device, a.lane, "ok", now_s, 1, answered=True) for a in asks}
        return Plan(round, now_s, math.inf, tuple(asks), (), finals)

    def deliver(self, plan: Plan, sizes: Mapping[str, Size], told: Callable[[int], None] = nobody) -> Delivery:
        """Returns what became of the requests: `sizes` of those of which a device told."""
        now_s, attempts, finals = self.now_s(), [], {}
        for ask in plan.asks:
            size = sizes.get(ask.request_id)
            outcome = "crashed" if size is None else size.outcome
            finals[ask.request_id] = Final(
                ask.request_id, ask.device, ask.lane, outcome, now_s, 1, None if outcome == "ok" else now_s,
                answered=size is not None and outcome not in TRANSPORT_OUTCOMES,
            )  # fmt: skip
            if size is not None:
                attempts.append(VirtualAttempt(
                    ask.request_id, ask.device, ask.lane, 0, plan.start_s, now_s, outcome, size.bytes_up,
                    size.bytes_down, size.tokens_in, size.tokens_out,
                ))  # fmt: skip
        state = self._state.after(plan.start_s, plan.asks, {}, sizes, finals)
        return Delivery(plan.past(), tuple(attempts), finals, state)

    def measured(self) -> dict[str, Any]:
        """Returns when the run began (JSON)."""
        return {**super().measured(), "began_s": self._began_s}

    def carry(
        self, device: int, start_s: float, end_s: float, size_bytes: float, way: Literal["up", "down"]
    ) -> tuple[list[Carried], float | None]:
        """Nothing is simulated on its way: the backend counts what is sent."""
        return [], start_s

    def query_time_s(self, round: int, device: int, number: int) -> float:
        """Returns now: a query is asked when it is answered."""
        return self.now_s()

    def round_end_s(self, round: int) -> float:
        """Returns now: a round ends with its last pass."""
        return self.now_s()

    def answer_s(self, device: int, arm: str, prompt_tokens: int, new_tokens: int) -> float:
        """Returns 0: no answer's time is made up."""
        return 0.0

    def event_rows(self, schedule: Schedule) -> Iterator[dict[str, Any]]:
        """Yields none: events are what devices tell."""
        return iter(())

    def _version(
        self, plan: Plan, each: VirtualWork, state: State, on: str, from_s: float, steps: int, tokens: int,
        stop_s: float = math.inf,
    ) -> TrainedVersion | None:  # fmt: skip
        if not steps or from_s >= stop_s:
            return None
        version = TrainedVersion(each.device, each.arm, plan.round, on, from_s, from_s, "ok", 0.0, 0.0)
        state.live[each.device, each.arm].append(version)
        return version
