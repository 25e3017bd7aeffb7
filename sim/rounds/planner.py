"""Between the round loop and the timeline: which requests a round wants, what its adapters are trained on, and what the
hosts must be told. Names no text: a device's data is here only as counts and lengths.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.core.kinds import POLICIES, STRATEGIES
from untether.sim.core.learning import TrainSettings
from untether.sim.core.records import TRANSPORT_OUTCOMES
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS, CLOUD, FEDERATED, METHOD, trained
from untether.sim.population.source import Population, device_id
from untether.sim.rounds.day import AUGMENT, KINDS, Agenda, Day, Delivered
from untether.sim.rounds.garbage import uncollected
from untether.sim.rounds.learners import Learners
from untether.sim.rounds.material import SAMPLE_COUNTS, Material, takes
from untether.sim.rounds.messages import (
    FIRST,
    Begin,
    Fetch,
    Learn,
    Part,
    Refilter,
    RequestOf,
    Samples,
    TrainedIn,
    Update,
    Upload,
    Version,
)
from untether.sim.rounds.sharing import (
    Exchange,
    group_of,
    ledger_rows_of,
    selected,
    transfer_rows,
)
from untether.sim.time.asking import TOLD_EVERY, Ask, Size
from untether.sim.time.policies import Policies
from untether.sim.time.timeline_state import REAL, SAMPLES, STALE, VirtualWork
from untether.sim.time.wall import timeline_of

ALIKE = 50_000
"""Devices with the same data of which what an arm's training takes is worked out once."""


def request_names(experiment: Experiment, seed: int, round: int, device: int, tasks: Sequence[str]) -> list[str]:
    """Returns the names of one device's requests for samples in a round, in the order in which it makes them."""
    parts = math.ceil(experiment.cloud.samples / experiment.cloud.samples_per_request)
    names = [f"s{seed}-r{round}-{device_id(device)}-{task}" for task in tasks]
    return [name if part == 0 else f"{name}+{part}" for name in names for part in range(parts)]


def question_names(seed: int, round: int, device: int, tasks_of_queries: Sequence[str]) -> list[str]:
    """Returns the names of the cloud arm's requests: one a query."""
    name = f"s{seed}-r{round}-{device_id(device)}"
    return [f"{name}-{task}-q{number}" for number, task in enumerate(tasks_of_queries)]


class Rounds:
    """The virtual time of one seed, as the round loop uses it.

    1. `plan(round, devices)`; 2. fetch, by `Agenda.order`; 3. `deliver(agenda, sizes)`, filter again what is `short`,
    `schedule(delivered, materials)`; 4. learn, by `order(day)`; write `event_rows`; 5. `advance(day, errors)`, and
    commit with `state()`.

    Whether a device is due is decided apart for the arms that learn from samples and for `local`, which needs none:
    neither the cloud's failures nor another arm's errors reach it. Raises UserError where that cannot be decided.
    """

    def __init__(
        self, experiment: Experiment, seed: int, population: Population, state: Mapping[str, Any] | None = None,
        told: Callable[[str, int], None] = lambda stage, devices: None,
    ):  # fmt: skip
        state = state or {}
        self._told = {stage: partial(told, stage) for stage in ("plan", "deliver", "schedule")}
        self.experiment, self.seed, self.population = experiment, seed, population
        self.timeline = timeline_of(experiment, seed, device_id, state.get("timeline"))
        kept = state.get("policies", {})
        self.learners = Learners(experiment, seed, len(population), state.get("learners"))
        self.policies = {on: Policies(experiment.drift, kept.get(on), experiment.settings) for on in (SAMPLES, REAL)}
        self._samples: dict[int, dict[int, tuple[int, ...]]] = {
            int(device): {int(round): tuple(counts) for round, counts in found.items()}
            for device, found in state.get("samples", {}).items()
        }
        self._asked: dict[int, tuple[tuple[str, ...], tuple[tuple[str, int | None], ...]]] = {}
        self._alike: dict[Any, Any] = {}  # of what many devices have, one
        self.arms = trained(experiment.arms)
        training = {arm: TrainSettings.of(experiment.for_arm(arm)[1]) for arm in ARMS}
        self._takes = {arm: lru_cache(ALIKE)(partial(takes, arm, training[ARMS[arm].steps_of or arm])) for arm in ARMS}
        self._falls_back = experiment.network.fallback == "stale_samples"
        self._uses_again = experiment.drift.samples != "refresh"
        self.learning = {
            on: [arm for arm in self.arms if ARMS[arm].needs_samples == (on == SAMPLES)] for on in (SAMPLES, REAL)
        }
        self.by_day = experiment.hardware.queries == "day"
        self.federates = STRATEGIES.fact(experiment.strategy.name, "shares")
        self._trained_in: dict[int, int] = {int(device): last for device, last in state.get("trained_in", {}).items()}
        self.asks_samples = bool(experiment.cloud.samples and self.learning[SAMPLES])
        watching = POLICIES.fact(experiment.drift.policy, "watches")
        if watching and self.learning[SAMPLES] and METHOD not in self.arms:
            raise UserError(
                f'drift.policy = "{experiment.drift.policy}" watches the answers of the arm {METHOD}, which is not '
                f"among arms = {list(experiment.arms)}. Add it: all arms that learn from samples ask when that one "
                "needs it"
            )

    # --- 1. plan ----------------------------------------------------------------------------------------------

    @uncollected()
    def plan(self, round: int, devices: Sequence[int]) -> Agenda:
        """Plans who asks and trains in a round, and which of all requests get through."""
        sizes = {lane: self.timeline.expected(lane) for lane in (AUGMENT, CLOUD)}
        due, alone = (
            tuple(device for device in devices if self._due(round, device, on, sizes[AUGMENT]))
            for on in (SAMPLES, REAL)
        )
        owing = set(due) if self.asks_samples else set()
        asks = [ask for device in devices for ask in self._asks(round, device, device in owing, sizes)]
        return Agenda(self.timeline.plan(round, asks, self._told["plan"]), due, alone)

    def _due(self, round: int, device: int, on: str, size: Size) -> bool:
        if not self.learning[on] and not (on == REAL and self.federates):
            return False
        start_s, expected = round * DAY_S, 0
        if self.asks_samples and on == SAMPLES:
            parts = math.ceil(self.experiment.cloud.samples / self.experiment.cloud.samples_per_request)
            expected = (size.tokens_in + size.tokens_out) * parts * len(self._asks_about(device)[0])

        def online() -> bool:
            return self.timeline.link(device).next_up(start_s, start_s + DAY_S) is not None

        return self.policies[on].due(round, device, expected, online)

    def _asks(self, round: int, device: int, for_samples: bool, sizes: Mapping[str, Size]) -> Iterator[Ask]:
        tasks, queries = self._asks_about(device)
        if for_samples:
            for name in request_names(self.experiment, self.seed, round, device, tasks):
                yield Ask(name, device, sizes[AUGMENT], AUGMENT)
        if CLOUD in self.experiment.arms:
            by_day, of_queries = self.by_day, [task for task, when in queries if when in (None, round)]
            names = question_names(self.seed, round, device, of_queries)
            times = [self.timeline.query_time_s(round, device, number) for number in range(len(names))]
            order = sorted(range(len(names)), key=times.__getitem__) if by_day else range(len(names))
            for number in order:
                yield Ask(names[number], device, sizes[CLOUD], CLOUD, times[number] if by_day else None)

    def _asks_about(self, device: int) -> tuple[tuple[str, ...], tuple[tuple[str, int | None], ...]]:
        """The tasks that a device asks samples for, and of each of its queries the task and the round (None: all)."""
        if device not in self._asked:
            asked = tuple(self.population.asked(device))
            found = tuple(dict.fromkeys(task for task, _ in asked)), asked
            self._asked[device] = self._alike.setdefault(found, found)
        return self._asked[device]

    # --- 2. fetch ---------------------------------------------------------------------------------------------

    def fetch(self, agenda: Agenda) -> Fetch:
        """Returns the order: who asks for samples, and the requests that are not to be made."""
        plan, granted, learn = agenda.plan, agenda.plan.granted, self.learners
        held = (RequestOf(ask.device, ask.request_id) for ask in plan.asks if ask.request_id not in granted)
        return Fetch(
            seed=self.seed, round=plan.round, devices=learn.among(agenda.asking), due=learn.among(agenda.due),
            held=learn.rows(held),
        )  # fmt: skip

    # --- 3. schedule ------------------------------------------------------------------------------------------

    @uncollected()
    def deliver(self, agenda: Agenda, sizes: Mapping[str, Size]) -> Delivered:
        """Tells whose answer reaches its device, and when. `sizes` of the requests that were made."""
        plan, granted = agenda.plan, agenda.plan.granted
        delivery = self.timeline.deliver(
            plan, self.learners.sizes(plan.round, plan.asks, granted, sizes), self._told["deliver"]
        )
        agenda = replace(agenda, plan=delivery.plan)
        finals = [delivery.finals[name] for name in sorted(granted.intersection(sizes))]
        written = [each for each in finals if sizes[each.request_id].outcome not in TRANSPORT_OUTCOMES]
        missed = [each for each in written if not each.answered]
        lost = {
            lane: tuple(RequestOf(each.device, each.request_id) for each in missed if each.lane == lane)
            for lane in (AUGMENT, CLOUD)
        }
        return Delivered(agenda, delivery, sizes, lost)

    def filter(self, delivered: Delivered, samples: Sequence[Part]) -> Refilter:
        """Returns the order for devices that lost answers with samples, which the filters must not have seen."""
        return Refilter(
            seed=self.seed, round=delivered.agenda.plan.round, devices=tuple(delivered.short),
            lost=delivered.lost[AUGMENT], samples=tuple(samples),
        )  # fmt: skip

    @uncollected()
    def schedule(
        self, delivered: Delivered, materials: Mapping[int, Material], travels: tuple[float, float] = (0.0, 0.0)
    ) -> Day:
        """Returns when everything ends. `materials`: what the devices that are due can train on, of what reached them;
        `travels`: what does up and down of what is shared, in adapters.
        """
        agenda, plan, finals = delivered.agenda, delivered.agenda.plan, delivered.delivery.finals
        wanted: dict[int, list[str]] = {device: [] for device in agenda.due}
        for ask in plan.asks:
            if ask.lane == AUGMENT:
                wanted[ask.device].append(ask.request_id)

        def got(device: int) -> int:
            return sum(finals[name].outcome == "ok" for name in wanted.get(device, ()))

        materials = self.learners.materials(plan.round, agenda.asking, got, materials)
        works: Iterable[VirtualWork] = self._works(agenda, materials, wanted)
        exchange, asked = Exchange(self.experiment, self.timeline, plan, *travels), ()
        if self.federates:
            able = {d: self._work(plan.round, d, FEDERATED, materials[d], ()) for d in agenda.alone if d in materials}
            able = {device: work for device, work in able.items() if work.steps}
            asked = selected(
                self.experiment, self.timeline, plan, able, self._trained_in, lambda device: materials[device].real
            )
            works = itertools.chain(works, exchange.down(able, asked))
        last = plan.round + 1 == self.experiment.rounds
        schedule = self.timeline.train(delivered.delivery, works, self.learners, last)
        tokens: dict[int, int] = defaultdict(int)
        for attempt in schedule.attempts:
            if attempt.lane == AUGMENT:
                tokens[attempt.device] += attempt.tokens_in + attempt.tokens_out
        served, came = {}, {}
        for device, names in wanted.items():
            done = any(finals[name].outcome == "ok" for name in names)
            served[device] = (tokens[device], done or not names)
            if done and device in materials:
                counts = tuple(getattr(materials[device], name) for name in SAMPLE_COUNTS)
                came[device] = self._alike.setdefault(counts, counts)
        own = frozenset(device for device in agenda.alone if device in materials and materials[device].real)
        return Day(delivered, schedule, served, came, own, exchange.up(asked, schedule))

    def _works(
        self, agenda: Agenda, materials: Mapping[int, Material], wanted: Mapping[int, Sequence[str]]
    ) -> Iterator[VirtualWork]:
        """What each device trains by itself, device by device: a large fleet's is never in memory together, nor are its
        habits drawn more than once.
        """
        everybody, due = len(self.population), ((REAL, agenda.alone), (SAMPLES, agenda.due))
        most = max(len(devices) for _, devices in due)
        turns = heapq.merge(*(zip(sorted(devices), itertools.repeat(on), strict=False) for on, devices in due))
        for place, (device, own) in enumerate(itertools.groupby(turns, key=itemgetter(0)), 1):
            for _, on in own:
                if device in materials:
                    for arm in self.learning[on]:
                        yield self._work(agenda.plan.round, device, arm, materials[device], wanted.get(device, ()))
            if not place % TOLD_EVERY:
                self._told["schedule"](min(everybody, everybody * place // most))

    def _work(self, round: int, device: int, arm: str, own: Material, requests: Sequence[str]) -> VirtualWork:
        held, stale = (
            tuple(self._samples[device][past] for past in rounds)
            for rounds in (self._earlier(round, device), self._stale(device))
        )
        needs = tuple(requests) if ARMS[arm].needs_samples else ()
        steps, tokens, *fallback, row_tokens = self._takes[arm](own, held, stale)
        return VirtualWork(device, arm, steps, tokens, needs, *fallback, row_tokens)

    def _earlier(self, round: int, device: int) -> list[int]:
        """The earlier rounds whose samples a device trains on beside those of `round`: with `age`, a sample is used in
        the round in which it came and the `max_age - 1` rounds after it.
        """
        if not self._uses_again:
            return []
        drift, rounds = self.experiment.drift, self._samples.get(device, {})
        oldest = 0 if drift.samples == "keep" else round - drift.max_age + 1
        return [past for past in rounds if oldest <= past < round]

    def _stale(self, device: int) -> list[int]:
        """The round whose samples a device falls back on, if it does and has any."""
        return sorted(self._samples.get(device, ()))[-1:] if self._falls_back else []

    # --- 4. train together ------------------------------------------------------------------------------------

    def begin(self, round: int, devices: Sequence[int]) -> Begin:
        """Returns the order to say what is shared before anybody trained."""
        groups = (group_of(self.experiment, self._asks_about(device)[0]) for device in devices)
        return Begin(seed=self.seed, round=round, groups=tuple(sorted(set(groups))))

    def update(self, day: Day, arrays: Mapping[str, Any]) -> Update:
        """Returns the order to train together."""
        devices = day.cohort.took_part
        return Update(
            seed=self.seed, round=day.schedule.plan.round, devices=devices, trained=self._last(devices), arrays=arrays
        )

    def _last(self, devices: Sequence[int]) -> tuple[TrainedIn, ...]:
        return tuple(TrainedIn(device, self._trained_in[device]) for device in devices if device in self._trained_in)

    # --- 5. learn ---------------------------------------------------------------------------------------------

    def learn(
        self, day: Day, samples: Sequence[Part], answers: Sequence[Part], arrays: Mapping[str, Any]
    ) -> Learn:
        """Returns the order: which adapters are trained, on what, and which may answer from when."""
        round, start_s = day.schedule.plan.round, day.schedule.plan.start_s
        by_day, settled = self.by_day, round - 1
        versions = []
        for (device, arm), found in sorted(day.schedule.state.live.items(), key=itemgetter(0)):
            if arm == FEDERATED:  # what answers is shared
                continue
            for place, version in enumerate(found):
                later = any(other.round == version.round for other in found[place + 1 :])
                if by_day or place == len(found) - 1:
                    kept = arm + FIRST if later else arm
                    versions.append(Version(device, arm, version.round, version.on, version.live_s, kept))
                if by_day and version.live_s > start_s and version.round < round:
                    settled = min(settled, version.round - 1)
        trains = [
            Samples(device, rounds[0], rounds[-1], on)
            for device in self.learners.among(day.agenda.due)
            for on, rounds in (
                (SAMPLES, [*self._earlier(round, device), *([round] if device in day.came else [])]),
                (STALE, self._stale(device)),
            )
            if rounds
        ]
        devices = tuple(self.learners.devices)
        return Learn(
            seed=self.seed, round=round, devices=devices, due=self.learners.among(day.agenda.due), settled=settled,
            measured=json.dumps(self.timeline.measured()), versions=tuple(versions), trains=tuple(trains),
            lost=day.delivered.lost[CLOUD], uploads=tuple(self._uploads(day)), samples=tuple(samples),
            answers=tuple(answers), trained=self._answering(day, devices), arrays=arrays,
        )  # fmt: skip

    def _uploads(self, day: Day) -> Iterator[Upload]:
        """What each attempt that sent anything sent, of devices that learn."""
        sizes = {ask.request_id: ask.size for ask in self.learners.rows(day.agenda.plan.asks)}
        sizes |= day.delivered.sizes
        for attempt in self.learners.rows(day.schedule.attempts):
            if attempt.bytes_up > 0:
                size = sizes[attempt.request_id]
                copies = attempt.bytes_up / size.bytes_up * size.bodies
                yield Upload(attempt.device, attempt.request_id, attempt.number, attempt.start_s, copies)

    def _answering(self, day: Day, devices: Sequence[int]) -> tuple[TrainedIn, ...]:
        """The round of the private part that a device answers with: this one's too, where queries come at its end."""
        now = {} if self.by_day else dict.fromkeys(day.cohort.took_part, day.schedule.plan.round)
        last = self._trained_in | now
        return tuple(TrainedIn(device, last[device]) for device in devices if device in last)

    def event_rows(
        self, day: Day, answers: Sequence[Mapping[str, Any]], learned: Sequence[Mapping[str, Any]] = ()
    ) -> Iterator[dict[str, Any]]:
        """Yields the round's rows of `events`: those of the timeline, with what the passes know of real answers and
        real training (`answers`, `learned`: their own rows), and all else that the passes noted.
        """
        schedule = day.schedule
        yield from transfer_rows(self.timeline, schedule.plan, day.cohort)
        if self.timeline.real:
            yield from map(dict, (*answers, *learned))
            return
        details = {row["request_id"]: row["detail"] for row in answers if row["kind"] in KINDS}
        training = {row["event_id"]: row for row in learned if row["kind"] == "train"}
        yield from (dict(row) for row in (*answers, *learned) if row["kind"] not in (*KINDS, "train"))
        for row in self.timeline.event_rows(schedule):
            if row["kind"] == "train":
                real = training.get(row["event_id"])
                if real is not None and row["outcome"] == "ok":
                    row |= {name: real[name] for name in ("tokens_in", "steps", "outcome")}
                    row["detail"] = f"{row['detail']}, {real['detail']}"
            elif row["attempt"] == schedule.finals[row["request_id"]].attempts - 1:
                row["detail"] = " ".join(filter(None, [row["detail"], details.get(row["request_id"])]))
            yield row

    def ledger_rows(self, day: Day) -> list[dict[str, Any]]:
        """Returns the round's rows of `ledger` beside those of requests: what devices uploaded of what is shared."""
        what = f"{self.experiment.strategy.name}: what is shared of an adapter"
        return ledger_rows_of(self.timeline, day.cohort, what)

    # --- 6. commit --------------------------------------------------------------------------------------------

    def advance(
        self, day: Day, errors: Mapping[str, Mapping[int, Sequence[float]]] | None = None, lost: Collection[int] = ()
    ) -> None:
        """Makes a round the past. `errors`: how wrong each device's answers were (see `Policies.observe`), of the arm
        that is `watched` for those that learn from samples or from real data alone; `lost`: the devices that the learn
        pass could not finish, which have no adapter of this round.
        """
        round = day.schedule.plan.round
        self.timeline.advance(day.schedule, lost)
        self._trained_in |= dict.fromkeys(day.cohort.took_part, round)
        for device, (tokens, done) in day.served.items():
            self.policies[SAMPLES].served(round, device, tokens, done)
        for device in day.agenda.alone:
            self.policies[REAL].served(round, device, 0, device in day.trained)
        for on, found in (errors or {}).items():
            for device, of_device in found.items():
                self.policies[on].observe(device, of_device)
        for device, counts in day.came.items() if self._uses_again or self._falls_back else ():
            kept = {past: self._samples[device][past] for past in self._earlier(round + 1, device)}
            if self.experiment.drift.samples == "keep" and len(kept) > 1:  # one sum, however many rounds it is of
                kept = {min(kept): tuple(map(sum, zip(*kept.values(), strict=True)))}
            self._samples[device] = {**kept, round: counts}

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs (JSON)."""
        return {
            "timeline": self.timeline.state(), "samples": self._samples, "trained_in": self._trained_in,
            "policies": {on: policies.state() for on, policies in self.policies.items()},
            "learners": self.learners.state(),
        }
