"""The timeline: each round in virtual time, from links, hardware and the cloud's capacity.

`plan` says, from expected sizes, which requests get through: exactly those are made for real. `deliver` then simulates
the same requests with their real sizes, and says when each answer arrives; `train`, when the adapters made of them go
live. `advance` makes a schedule the past. Nothing here learns or waits.

Every arm is simulated by itself (its battery, its warmth, its share of the cloud) with common random numbers: links,
habits and jitter follow from (seed, device, round, purpose). Adding an arm or a device with an unlimited cloud changes
no other's row; the order of devices never does.

What every device makes many of a day (`VirtualAttempt`, `TrainedVersion`, `Body`, ...) is never changed, and not frozen
either: a frozen dataclass takes five times as long to make, which was an eighth of a large fleet's day.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

from untether.sim.core.clock import DAY_S
from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.prompts.protocol import CHARS_PER_TOKEN
from untether.sim.time.asking import Ask, Asked, Final, Rules, Size, VirtualAttempt, ask_all
from untether.sim.time.cost import CostModel, model_shape
from untether.sim.time.hardware import THIS_MACHINE, Fleet, Profile
from untether.sim.time.network import Link, Links, StateTrace
from untether.sim.time.network.links import most_kept
from untether.sim.time.network.transfers import Carried, carry
from untether.sim.time.readiness import Body, Readiness, rest, work
from untether.sim.time.timeline_state import REAL, SAMPLES, STALE, State, TrainedVersion, VirtualWork


def nobody(devices: int) -> None:
    """Hears how many devices are done, and says nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The expected course of a round. `granted`: the requests to make for real; every other one is final as planned."""

    round: int
    start_s: float
    end_s: float
    asks: tuple[Ask, ...]
    attempts: tuple[VirtualAttempt, ...]
    finals: Mapping[str, Final]

    @property
    def granted(self) -> frozenset[str]:
        return frozenset(name for name, final in self.finals.items() if final.outcome == "ok")

    def past(self) -> Plan:
        """Returns the plan without what was expected, once it is known what happened: a large fleet's is large."""
        return replace(self, attempts=(), finals={})


@dataclass(frozen=True, slots=True)
class Delivery:
    """The result of a round's requests: every attempt, and one final outcome a request. `plan` has no others.

    `received`: the requests whose answer reached its device (an answer that was requested and did not arrive is
    wasted).
    """

    plan: Plan
    attempts: tuple[VirtualAttempt, ...]
    finals: Mapping[str, Final]
    state: State = field(repr=False)

    @property
    def received(self) -> frozenset[str]:
        return frozenset(name for name, final in self.finals.items() if final.outcome == "ok")


@dataclass(frozen=True, slots=True)
class Schedule(Delivery):
    """A whole round: the result of its requests, and every version of every adapter."""

    versions: tuple[TrainedVersion, ...] = ()


class Timeline:
    """The virtual time of one seed of an experiment; `real`: whether it is simulated at all.

    Args:
        experiment: The experiment.
        seed: The seed.
        device_id: The name of a device in draws and rows, by its number.
        state: What an earlier timeline's `state()` returned: a resumed run continues from it.

    Raises:
        UserError: A profile or model is unknown, or a trace cannot be read.
    """

    real = False

    def __init__(
        self, experiment: Experiment, seed: int, device_id: Callable[[int], str], state: Mapping[str, Any] | None = None
    ):
        self.experiment, self.seed, self.device_id = experiment, seed, device_id
        self._state = State.load(state or {})
        hardware = experiment.hardware
        self._most = most_kept(experiment.population.users)
        self.links = Links(experiment.network, seed, experiment.settings, self._most)
        self.fleet = Fleet(hardware.profiles, hardware.catalogue, seed, self._state.this_machine)
        self.model = model_shape(hardware.nominal_model)
        self._profiles: dict[int, Profile] = {}
        self._readiness: dict[int, Readiness] = {}
        self._costs: dict[tuple[str, str], CostModel] = {}
        if hardware.train_when == "trace":
            self.readiness(0)  # a missing trace is told at once

    # --- the devices ------------------------------------------------------------------------------------------

    def link(self, device: int) -> Link:
        """Returns the device's link."""
        return self.links.of(device, self.device_id(device))

    def profile(self, device: int) -> Profile:
        """Returns the device's hardware."""
        if device not in self._profiles:
            self._profiles[device] = self.fleet.of(self.device_id(device))
        return self._profiles[device]

    def readiness(self, device: int) -> Readiness:
        """Returns when the device may train."""
        if device not in self._readiness:
            if len(self._readiness) >= self._most:
                self._readiness.clear()
            name = self.device_id(device)
            trace = self.links.trace_of(name)
            phase_s = self.links.phase_s(name, trace) if isinstance(trace, StateTrace) else 0.0
            states = trace if isinstance(trace, StateTrace) else None
            self._readiness[device] = Readiness.of(
                self.experiment.hardware, self.profile(device), self.seed, name, states, phase_s
            )
        return self._readiness[device]

    def cost(self, device: int, arm: str) -> CostModel:
        """Returns the costs of the nominal model on this device, with this arm's adapter."""
        profile = self.profile(device)
        if (profile.name, arm) not in self._costs:
            lora, _ = self.experiment.for_arm(arm)
            hardware = self.experiment.hardware
            cost = CostModel(profile, self.model, hardware.weight_bits, lora, hardware.gradient_checkpointing)
            self._costs[profile.name, arm] = cost
        return self._costs[profile.name, arm]

    # --- the round --------------------------------------------------------------------------------------------

    def expected(self, lane: str = "augment") -> Size:
        """Returns the expected size of a request: the mean of those that returned, else one from the experiment."""
        if lane in self._state.sizes:
            return Size(*(round(value) for value in self._state.sizes[lane][1:]))
        cloud = self.experiment.cloud
        tokens_in = min(cloud.show_chars // CHARS_PER_TOKEN, 60 * cloud.show_items) + 300
        tokens_out = min(cloud.max_tokens, 60 * cloud.samples_per_request if lane == "augment" else 20)
        return Size(CHARS_PER_TOKEN * tokens_in + 500, CHARS_PER_TOKEN * tokens_out + 500, tokens_in, tokens_out)

    def plan(self, round: int, asks: Sequence[Ask], told: Callable[[int], None] = nobody) -> Plan:
        """Plans a round: which requests get through, if all have the sizes they are expected to have.

        `told` hears now and then how many devices have asked.
        """
        start_s, end_s = round * DAY_S, (round + 1) * DAY_S
        self.links.forget(start_s)
        for readiness in self._readiness.values():
            readiness.forget(start_s)
        lanes = self._ask(round, asks, told)
        attempts = tuple(attempt for asked in lanes.values() for attempt in asked.attempts)
        finals = {ask.request_id: lanes[ask.lane].finals[ask.request_id] for ask in asks}
        return Plan(round, start_s, end_s, tuple(asks), attempts, finals)

    def schedule(self, plan: Plan, sizes: Mapping[str, Size], works: Iterable[VirtualWork] = ()) -> Schedule:
        """Applies `deliver`, then `train`."""
        return self.train(self.deliver(plan, sizes), works)

    def deliver(self, plan: Plan, sizes: Mapping[str, Size], told: Callable[[int], None] = nobody) -> Delivery:
        """Returns when each request ends, from the real sizes of the granted ones. `told`: as in `plan`.

        A granted request without a size was never answered: its outcome is `crashed`. Requests that were not granted
        end as planned: they are not made again, but keep the places at the cloud that they took.
        """
        granted = plan.granted
        unknown = set(sizes) - granted
        if unknown:
            raise ValueError(f"sizes of requests that were not granted: {sorted(unknown)[:3]}")
        attempts = [attempt for attempt in plan.attempts if attempt.request_id not in granted]
        as_planned: dict[str, list[VirtualAttempt]] = {name: [] for name in plan.finals if name not in granted}
        for attempt in sorted(attempts, key=attrgetter("number")):
            as_planned[attempt.request_id].append(attempt)
        lanes = self._ask(plan.round, plan.asks, told, sizes, as_planned)
        finals = {name: plan.finals[name] for name in as_planned}
        for asked in lanes.values():
            attempts += asked.attempts
            for name, final in asked.finals.items():
                answer = sizes[name].outcome if name in sizes else "crashed"
                if final.answered and answer != "ok":
                    final = replace(final, outcome=answer, answered=answer != "crashed")
                finals[name] = final
        finals = {ask.request_id: finals[ask.request_id] for ask in plan.asks}
        state = self._state.after(plan.start_s, plan.asks, lanes, sizes, finals)
        return Delivery(plan.past(), tuple(attempts), finals, state)

    def train(
        self, delivery: Delivery, works: Iterable[VirtualWork] = (), answering: Collection[int] | None = None,
        last: bool = False,
    ) -> Schedule:  # fmt: skip
        """Returns when each adapter is trained, from what was delivered and the steps that each takes.

        Args:
            delivery: The result of the round's requests.
            works: What is trained, each adapter once.
            answering: The devices that are asked what answers; of others, no adapter is remembered. None: all.
            last: Whether no round is to come, for which the devices themselves are remembered.
        """
        plan, finals = delivery.plan, delivery.finals
        state, versions = delivery.state.copy(), list[TrainedVersion]()
        for each in works:
            versions += self._train(plan, each, finals, state)
            if answering is not None and each.device not in answering:
                state.live.pop((each.device, each.arm), None)
            if last:
                state.bodies.pop((each.device, each.arm), None)
        return Schedule(plan, delivery.attempts, finals, state, tuple(versions))

    def advance(self, schedule: Schedule, lost: Collection[int] = ()) -> None:
        """Makes a schedule the past: the next round starts from it. Devices that were `lost` trained nothing in it."""
        self._state = schedule.state
        for (device, _), found in self._state.live.items() if lost else ():
            if device in lost:
                found[:] = [version for version in found if version.round != schedule.plan.round]

    def state(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs (JSON)."""
        return {**self._state.dump(), **self.measured()}

    def measured(self) -> dict[str, Any]:
        """Returns the measured profile of this machine (JSON), if devices have it: measured once, for all processes."""
        found = [profile for profile in self.fleet.profiles if profile.name == THIS_MACHINE]
        return {"this_machine": {**asdict(found[0]), "sources": dict(found[0].sources)}} if found else {}

    def _ask(
        self, round: int, asks: Sequence[Ask], told: Callable[[int], None], sizes: Mapping[str, Size] | None = None,
        as_planned: Mapping[str, Sequence[VirtualAttempt]] | None = None,
    ) -> dict[str, Asked]:  # fmt: skip
        experiment, lanes = self.experiment, defaultdict(list)
        for ask in asks:
            lanes[ask.lane].append(ask)
        rules = Rules(
            self.seed, round, round * DAY_S, (round + 1) * DAY_S, experiment.network.ask_within_h * 3600,
            experiment.cloud.timeout_s, experiment.cloud.capacity, self.device_id,
        )
        return {
            lane: ask_all(
                lanes[lane], self.link, rules, self._state.clouds.get(lane), self._state.spent.get(lane), sizes,
                as_planned, told,
            )
            for lane in sorted(lanes)
        }

    # --- training ---------------------------------------------------------------------------------------------

    def _train(self, plan: Plan, each: VirtualWork, finals: Mapping[str, Final], state: State) -> list[TrainedVersion]:
        """The versions of one adapter in one round: perhaps one on what there is, then one with the samples."""
        asked = [finals[name] for name in each.needs]
        received_s = max((final.end_s for final in asked if final.answered), default=None)
        failed_s = min((final.failed_s for final in asked if final.failed_s is not None), default=None)
        if received_s is None and failed_s is None:  # crashed
            failed_s = max((final.end_s for final in asked), default=None)
        versions: list[TrainedVersion] = []
        fallback = self.experiment.network.fallback
        if not asked:
            from_s = max(plan.start_s, each.from_s)
            versions.append(self._version(plan, each, state, REAL, from_s, each.steps, each.tokens))
        elif failed_s is not None and fallback != "wait" and each.fallback_steps:
            had = fallback == "stale_samples" and each.device in self._state.had_samples
            on = STALE if had else REAL
            stop_s = math.inf if received_s is None else received_s
            if failed_s < stop_s:
                versions.append(
                    self._version(
                        plan, each, state, on, failed_s, each.fallback_steps, each.fallback_tokens, stop_s
                    )
                )
        if asked and received_s is not None and each.steps:
            versions.append(self._version(plan, each, state, SAMPLES, received_s, each.steps, each.tokens))
        return [version for version in versions if version is not None]

    def _version(
        self, plan: Plan, each: VirtualWork, state: State, on: str, from_s: float, steps: int, tokens: int,
        stop_s: float = math.inf,
    ) -> TrainedVersion | None:  # fmt: skip
        if not steps:
            return None
        key, profile, readiness = (each.device, each.arm), self.profile(each.device), self.readiness(each.device)
        cost = self.cost(each.device, each.arm)
        body = state.bodies.get(key, Body())
        from_s = max(from_s, body.time_s)  # work of an earlier round may still go on
        if not cost.fits(each.row_tokens):
            return TrainedVersion(each.device, each.arm, plan.round, on, from_s, math.inf, "out_of_memory", 0.0, 0.0)
        if from_s >= stop_s:
            return None
        seconds = cost.training_s(tokens, context=min(each.row_tokens, tokens / max(1, steps)))
        done = work(from_s, seconds, rest(body, from_s, profile, readiness), profile, readiness, stop_s)
        if done.begun_s is None and stop_s < math.inf:
            return None  # the samples came before it could begin
        outcome = "ok" if done.end_s < math.inf else "superseded" if stop_s < math.inf else "never_ready"
        if outcome != "never_ready":
            state.bodies[key] = done.body
        begun_s = from_s if done.begun_s is None else done.begun_s
        energy_j = cost.energy_j(done.cool_s)
        version = TrainedVersion(
            each.device, each.arm, plan.round, on, begun_s, done.end_s, outcome, done.load_s, energy_j
        )
        if outcome == "ok":
            state.live[key].append(version)
        return version

    def carry(
        self, device: int, start_s: float, end_s: float, size_bytes: float, way: Literal["up", "down"]
    ) -> tuple[list[Carried], float | None]:
        """Sends what is shared over the device's link, as `sim.time.network.transfers.carry` says."""
        return carry(self.link(device), device, start_s, end_s, size_bytes, way)

    # --- answering --------------------------------------------------------------------------------------------

    def query_time_s(self, round: int, device: int, number: int) -> float:
        """Returns when query `number` of a round is asked: its end or, through the day, between 7 and 23 o'clock."""
        if self.experiment.hardware.queries == "round_end":
            return self.round_end_s(round)
        drawn = derive(self.seed, self.device_id(device), round, "query", number) / 2**63
        return round * DAY_S + (7 + 16 * drawn) * 3600

    def round_end_s(self, round: int) -> float:
        """Returns when a round ends."""
        return (round + 1) * DAY_S

    def answering(self, schedule: Schedule, device: int, arm: str, time_s: float) -> TrainedVersion | None:
        """Returns the adapter that answers at `time_s`; None: the frozen base.

        With queries at the round's end, it is the newest one that the round's work leads to, whenever that ends.
        """
        known = schedule.state.live.get((device, arm), [])
        if self.experiment.hardware.queries == "day":
            known = [version for version in known if version.live_s <= time_s]
        return max(known, key=lambda version: version.live_s, default=None)

    def answer_s(self, device: int, arm: str, prompt_tokens: int, new_tokens: int) -> float:
        """Returns the seconds that the (cool) device takes to answer."""
        return self.cost(device, arm).decoding_s(prompt_tokens, new_tokens)

    # --- rows -------------------------------------------------------------------------------------------------

    def event_rows(self, schedule: Schedule) -> Iterator[dict[str, Any]]:
        """Yields the rows of `events`: one an attempt (a request's last one has its final outcome), one a version."""
        for attempt in schedule.attempts:
            final = schedule.finals[attempt.request_id]
            last = attempt.number == final.attempts - 1
            answer = attempt.lane != "augment"
            yield {
                "time_s": attempt.start_s, "event_id": f"{attempt.request_id}#{attempt.number}",
                "request_id": attempt.request_id, "attempt": attempt.number,
                "device_id": self.device_id(attempt.device), "arm": attempt.lane if answer else None,
                "kind": "answer" if answer else "augment", "outcome": final.outcome if last else attempt.outcome,
                "duration_s": attempt.end_s - attempt.start_s, "bytes_up": round(attempt.bytes_up),
                "bytes_down": round(attempt.bytes_down), "tokens_in": attempt.tokens_in,
                "tokens_out": attempt.tokens_out,
                "energy_j": self.profile(attempt.device).radio_w * attempt.radio_s,
                "queued_s": attempt.queued_s, "detail": attempt.detail,
            }
        for version in schedule.versions:
            name = f"train-s{self.seed}-r{version.round}-{self.device_id(version.device)}-{version.arm}"
            ended = version.live_s if version.live_s < math.inf else version.begun_s + version.load_s
            yield {
                "time_s": version.begun_s, "event_id": f"{name}-{version.on}", "attempt": 0,
                "device_id": self.device_id(version.device), "arm": version.arm, "kind": "train",
                "outcome": version.outcome, "duration_s": ended - version.begun_s, "energy_j": version.energy_j,
                "detail": f"on {version.on}",
            }

