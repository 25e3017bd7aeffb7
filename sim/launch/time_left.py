"""How long a run still takes: from the work that is to be done and what work has cost so far.

A round is made of steps, each counted in a unit of its own (`sim.rounds.work`). What a unit costs is first a guess,
which counts less the more is measured; what is not measured yet is taken to deviate from its guess as the rest does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from untether.sim.rounds.work import Work

Step = tuple[str, str]
"""A stage (the order that hosts carry out) and the unit that it is counted in."""

STEPS: tuple[Step, ...] = (
    ("plan", "devices"), ("fetch", "requests"), ("fetch", "samples"), ("deliver", "devices"), ("filter", "samples"),
    ("schedule", "devices"), ("update", "tokens"), ("share", "tokens"), ("learn", "tokens"), ("learn", "answers"),
)  # fmt: skip
"""In their order."""

NAMES: Mapping[Step, str] = {
    ("plan", "devices"): "planning the fleet's day", ("deliver", "devices"): "delivering answers",
    ("schedule", "devices"): "scheduling training",
    ("fetch", "requests"): "asking the cloud", ("fetch", "samples"): "filtering samples",
    ("filter", "samples"): "filtering again", ("update", "tokens"): "training together",
    ("share", "tokens"): "training what is shared",
    ("learn", "tokens"): "training", ("learn", "answers"): "answering",
}  # fmt: skip
"""What a person calls them."""

SOMETIMES = ("plan", "deliver", "filter", "schedule", "update")
"""Stages that a run may be without, or that say nothing where the fleet is small."""

REPORT = "report"
"""The stage after the last round: tables, statistics, the page."""

BEGUN, BEGUN_ANSWERING = 0.05, 0.5
"""The share of a step from which on its own pace counts as much as the guess. Of answers the first tell little: workers
begin with them one after the other, each with its longest prompts.
"""


@dataclass(frozen=True, slots=True)
class Guess:
    """What a run is expected to take before anything is measured.

    Args:
        work: The units of each step in a whole round; of `share`, once a seed. Steps that are unknown are left out.
        cost_s: Seconds a unit of each step, all workers together.
        setup_s: Seconds that a step needs before its first unit, the first time: to load models.
        round_s: Seconds of a round beside its steps.
        report_s: Seconds of the report.
        elsewhere: Steps that wait for something else than what this machine computes, such as a cloud: how long says
            nothing of the other steps.
        once: Steps that each device does once a seed, in whichever round: what early rounds did is not left to later
            ones.
    """

    work: Mapping[Step, float] = field(default_factory=dict)
    cost_s: Mapping[Step, float] = field(default_factory=dict)
    setup_s: Mapping[Step, float] = field(default_factory=dict)
    round_s: float = 0.5
    report_s: float = 4.0
    elsewhere: frozenset[Step] = frozenset()
    once: frozenset[Step] = frozenset()


class TimeLeft:
    """The time left of one run: so many `rounds` in all, `done` of them behind it, `each` of a seed."""

    def __init__(self, rounds: int, done: int = 0, each: int = 1, guess: Guess | None = None):
        self.rounds, self.done, self.each, self.guess = rounds, done, each, guess or Guess()
        self._begun_at = done
        self._spent: dict[Step, float] = {}
        self._units: dict[Step, float] = {}
        self._whole: dict[Step, list[float]] = {}
        self._setups: dict[Step, float] = {}
        self._beside: list[float] = []
        self._stage, self._work, self._total = "", dict[str, float](), 0
        self._last_s = self._round_s = self._stage_s = 0.0
        self._waited_s = self._in_steps_s = 0.0

    def begin(self, now_s: float) -> None:
        """Begins a round."""
        self._round_s, self._in_steps_s = now_s, 0.0
        self._stage, self._work = "", {}

    def update(self, now_s: float, stage: str, work: Work, total: int) -> None:
        """Takes note of how much of a stage is done, of `total` devices."""
        if stage != self._stage:
            self._close(now_s)
            self._stage, self._work, self._stage_s, self._last_s, self._waited_s = stage, {}, now_s, now_s, 0.0
        self._total = total
        self._waited_s += now_s - self._last_s
        self._last_s = now_s
        more = {step: self._more(step, work) for step in self._steps()}
        self._work = dict(work)
        shares = {step: units * (self.cost_s(step) or 1e-9) for step, units in more.items() if units > 0}
        if not shares:
            return
        if new := shares.keys() - self._setups.keys():
            # The first units took their part of the wait, as far as the guess says; the rest of it was setting up.
            working = min(self._waited_s, sum(shares.values()))
            self._setups |= {step: (self._waited_s - working) / len(new) for step in new}
            self._waited_s = working
        whole = sum(shares.values())
        for step, share in shares.items():
            self._spent[step] = self._spent.get(step, 0.0) + self._waited_s * share / whole
            self._units[step] = self._units.get(step, 0.0) + more[step]
        self._in_steps_s, self._waited_s = self._in_steps_s + self._waited_s, 0.0

    def end(self, now_s: float) -> None:
        """Ends the round: it is committed."""
        self._close(now_s)
        setups = sum(self._setups.values()) if not self._beside else 0.0
        self._beside.append(max(0.0, now_s - self._round_s - self._in_steps_s - setups))
        self._stage, self._work = "", {}
        self.done += 1

    def step(self) -> Step | None:
        """Returns the step that is going on: the first that is not finished of those that the stage has begun."""
        steps = self._steps()
        begun = max((place for place, step in enumerate(steps) if self._work.get(step[1])), default=0)
        for place, step in enumerate(steps):
            due = self._due(step)
            if (due is None and place >= begun) or (due is not None and self._work.get(step[1], 0.0) < due):
                return step
        return steps[-1] if steps else None

    def counts(self, step: Step) -> tuple[float, float | None]:
        """Returns how many units of a step of this stage are done, and of how many, as far as that is known."""
        return self._work.get(step[1], 0.0), self._due(step)

    def share_done(self) -> float | None:
        """Returns the share of this stage that is done, by time; None while nobody knows."""
        parts = [(self.counts(step), self.cost_s(step)) for step in self._steps()]
        if not parts or any(due is None or cost is None for (_, due), cost in parts):
            return None
        whole = sum((due or 0.0) * (cost or 0.0) for (_, due), cost in parts)
        return min(1.0, sum(done * (cost or 0.0) for (done, _), cost in parts) / whole) if whole else None

    def left_s(self, now_s: float) -> float | None:
        """Seconds until everything is done; None while there is nothing to go by."""
        if self._stage == REPORT:
            return max(0.0, self.guess.report_s * self._pace() - (now_s - self._stage_s))
        here = self._stage_left_s(now_s)
        later = self._later_s()
        return None if here is None or later is None else here + later + self.guess.report_s * self._pace()

    def cost_s(self, step: Step) -> float | None:
        """Seconds a unit of a step: what was measured, with the guess as long as little was."""
        units, spent = self._units.get(step, 0.0), self._spent.get(step, 0.0)
        known = self.guess.cost_s.get(step)
        if known is None:
            return spent / units if units else None
        begun = BEGUN_ANSWERING if step == STEPS[-1] else BEGUN
        weight = begun * (self._due(step) or self._units_of(step) or 0.0)
        known *= 1.0 if step in self.guess.elsewhere else self._pace()
        return (spent + weight * known) / (units + weight) if units + weight else known

    def _pace(self) -> float:
        """How much slower than guessed this machine is, over all that was measured."""
        own = [step for step in self._units if step in self.guess.cost_s and step not in self.guess.elsewhere]
        guessed = sum(self._units[step] * self.guess.cost_s[step] for step in own)
        spent = sum(self._spent.get(step, 0.0) for step in own)
        return (spent + 2.0) / (guessed + 2.0)  # two seconds of each: the first moments say little

    def _steps(self) -> list[Step]:
        return [step for step in STEPS if step[0] == self._stage]

    def _more(self, step: Step, work: Work) -> float:
        return max(0.0, work.get(step[1], 0.0) - self._work.get(step[1], 0.0))

    def _due(self, step: Step) -> float | None:
        """The units of a step in this round: of what has begun, for all devices; else what is expected."""
        if step[0] != self._stage:
            return self._units_of(step)
        due, of = self._work.get(f"{step[1]}_due"), self._work.get(f"{step[1]}_of", 0.0)
        if due is None:
            return self._units_of(step)
        return due * max(1.0, self._total / of) if of else due

    def _units_of(self, step: Step) -> float | None:
        """The units of a step in a round to come: the mean of those that are done, else the guess."""
        seen = self._whole.get(step, [])
        if step in self.guess.once:
            rounds = self.rounds - self._begun_at
            left = self.guess.work.get(step, 0.0) * rounds - sum(seen)
            return max(0.0, left) / max(1, rounds - len(seen))
        if seen:
            return sum(seen) / len(seen)
        return self.guess.work.get(step, 0.0 if step[0] in SOMETIMES else None)

    def _stage_left_s(self, now_s: float) -> float | None:
        left_s = 0.0
        for step in self._steps():
            due, cost = self._due(step), self.cost_s(step)
            if due is None or cost is None:
                return None
            left_s += max(0.0, due - self._work.get(step[1], 0.0)) * cost
            if due and step not in self._setups:
                left_s += self.guess.setup_s.get(step, 0.0) * self._pace()
        return max(0.0, left_s - (now_s - self._last_s) - self._waited_s)

    def _later_s(self) -> float | None:
        """The steps of this round that are still to come, and the rounds after it."""
        order = [stage for stage, _ in STEPS]
        here = order.index(self._stage) if self._stage in order else -1
        rounds = self.rounds - self.done - (1 if self._stage else 0)
        if not self._stage and not rounds:
            return 0.0
        beside = sum(self._beside) / len(self._beside) if self._beside else self.guess.round_s
        left_s = (rounds + bool(self._stage)) * beside
        for step in STEPS:
            ahead = 1 if self._stage and order.index(step[0]) > here else 0
            if step[0] == "share":
                times = rounds // self.each + (ahead if not self.done % self.each else 0)
            else:
                times = ahead + rounds
            if not times:
                continue
            units, cost = self._units_of(step), self.cost_s(step)
            if step[0] == "share" and units is None:
                continue  # nothing is shared
            if units is None or (cost is None and units):
                return None
            left_s += times * units * (cost or 0.0)
            if step not in self._setups and step[0] != self._stage:
                left_s += self.guess.setup_s.get(step, 0.0) * self._pace()
        return left_s

    def _close(self, now_s: float) -> None:
        """The stage is over: what it had to do is what a later round's will have."""
        if self._stage in ("", REPORT):
            return
        self._in_steps_s += self._waited_s + now_s - self._last_s
        for step in self._steps():
            units = self._work.get(step[1], 0.0)
            if units and step in self._spent:
                self._spent[step] += (self._waited_s + now_s - self._last_s) / len(self._steps())
            if units or step in self.guess.work or step in self._whole:
                self._whole.setdefault(step, []).append(units)
        self._waited_s, self._last_s = 0.0, now_s
