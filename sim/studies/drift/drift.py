"""The analysis `drift`: how long adapters stay good while users change, and the value of asking again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from untether.sim.core.errors import UserError
from untether.sim.evaluation.resampling import AMOUNT, SHARE
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import FLOOR
from untether.sim.experiment.section import Section
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.drift import figures as drift_figures
from untether.sim.studies.drift.measures import (
    COSTS,
    USER,
    along,
    detections,
    fresh_for,
    front,
    gain_over_frozen,
    half_life,
    overall,
    paired,
    reach,
    read_answers,
    read_changes,
    read_costs,
    read_trained,
    read_two_golds,
    studied,
)
from untether.sim.studies.drift.prose import sentences
from untether.sim.studies.frames import Runs, each_cell
from untether.sim.studies.study import Study

CHANGE = "change"
"""The axis of how users change. What stands on all other axes is called a policy."""

COLUMNS = ["change", "policy", "reference", "users", "measure", "from", "to", "value", "low", "high", "n_users"]
"""Of the table. `from`, `to`: days of age (or since the change) that a row is about; empty: the whole run."""

DAYS = 3
"""Days that one point of a curve takes together."""


@dataclass(frozen=True)
class DriftCase:
    """A finished cell: how its users change, its policy, and the results of its run."""

    change: str
    policy: str
    run: RunDirectory

    @cached_property
    def experiment(self) -> Experiment:
        return self.run.experiment

    @cached_property
    def answers(self) -> pd.DataFrame:
        return read_answers(self.run)

    @cached_property
    def adapters(self) -> pd.DataFrame:
        """The answers that adapters gave."""
        return self.answers[self.answers["age"].notna()]

    @cached_property
    def costs(self) -> pd.DataFrame:
        return read_costs(self.run)


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv`, figures and `findings.md` (see docs/drift.md for the measures)."""
    cases = [_case(cell.words, cell.name, run) for cell, run in each_cell(study, runs)]
    for case in cases:
        if studied(case.experiment) is None or FLOOR not in case.experiment.arms:
            raise UserError(f"{study.spec.name}: arms = {list(case.experiment.arms)}: give `{FLOOR}` and a trained arm")
        if case.adapters.empty:
            raise UserError(f"{study.spec.name}: no adapter answered in {case.run.path.name}. Give more rounds")
    table = pd.DataFrame(measure(cases), columns=COLUMNS)
    write_table(out, table)
    for name, (figure, caption) in drift_figures.draw(table).items():
        save_figure(out, name, figure, caption)
    found, notes = sentences(table, cases[0].experiment)
    write_findings(study, out, found, notes)


def _case(words: dict[str, str], name: str, run: RunDirectory) -> DriftCase:
    policy = ", ".join(word for axis, word in words.items() if axis != CHANGE)
    return DriftCase(words.get(CHANGE, "all"), policy or name, run)


def measure(cases: Iterable[DriftCase]) -> Iterator[tuple]:
    """Yields all rows of the table: those of each case alone, and those of cases against each other."""
    by_change: dict[str, list[DriftCase]] = {}
    for case in cases:
        by_change.setdefault(case.change, []).append(case)
    for own in by_change.values():
        for case in own:
            for users, rows in case.adapters.groupby("users"):
                yield from _alone(case, str(users), rows)
            yield from _detector(case)
            yield from _two_golds(case)
        yield from _prices(own)
        best = _most_often([case for case in own if case.experiment.drift.policy == "every"])
        for case in own:
            yield from _against(case, own, best)


def _alone(case: DriftCase, users: str, rows: pd.DataFrame) -> Iterator[tuple]:
    """Scores, gains and half-lives."""
    head = (case.change, case.policy, "")
    yield _whole(*head, users, "score", overall(rows, "good"))
    for line in _lines(along(rows, "round", "good", DAYS)):
        yield (*head, users, "score by day", *line)
    gains = gain_over_frozen(case.answers)
    gains = gains[gains["users"] == users]
    if case.experiment.drift.policy == "never":
        upto = reach(gains)
        curve = along(gains[gains["age"] <= upto], "age", "gain", DAYS)
        for line in _lines(curve):
            yield (*head, users, "gain by age", *line)
        shown = len(curve) and curve["low"].iloc[0] > 0  # what is not there at first cannot halve
        half = half_life(gains, upto) if shown else (np.nan, np.nan, np.nan)
        yield (*head, users, "half-life", 0, upto, *half, gains.groupby(USER).ngroups)


def _detector(case: DriftCase) -> Iterator[tuple]:
    """Delay and false alarms, where a detector decides."""
    if case.experiment.drift.policy != "on_drift" or case.experiment.population.source != "world":
        return
    changes = read_changes(case.run)
    by_user = changes.groupby(USER)["changed_on"].min() if len(changes) else pd.Series(
        np.nan, pd.MultiIndex.from_frame(case.answers[USER].drop_duplicates())
    )  # fmt: skip
    found = detections(read_trained(case.run), by_user, case.experiment.rounds)
    found = found.join(case.answers.groupby(USER)["cluster"].first())
    head = (case.change, case.policy, "")
    quiet = found[found["quiet"] > 0]
    for users, rows in (("unchanged", quiet[by_user[quiet.index].isna()]), ("changed", quiet)):
        if users == "changed":
            rows = rows[by_user[rows.index].notna()]
        if len(rows):
            yield _whole(*head, users, "raised a false alarm", overall(rows.assign(x=rows["false"] > 0), "x", SHARE))
            share = 100 * rows["false"].sum() / rows["quiet"].sum()
            yield (*head, users, "false alarms in 100 days", np.nan, np.nan, share, np.nan, np.nan, len(rows))
    changed = found[by_user.notna()]
    if len(changed):
        yield _whole(*head, "changed", "detected", overall(changed.assign(x=changed["delay"].notna()), "x", SHARE))
        yield _whole(*head, "changed", "delay", overall(changed, "delay", AMOUNT))


def _two_golds(case: DriftCase) -> Iterator[tuple]:
    """What the old and the new person would have said, by days since the change."""
    if case.experiment.drift.kind == "none":
        return
    both = read_two_golds(case.run, case.answers)
    for persona in ("before", "now"):
        for line in _lines(along(both, "since", persona, DAYS)):
            yield (case.change, case.policy, "", "changed", f"score on the {persona} gold", *line)


def _prices(cases: list[DriftCase]) -> Iterator[tuple]:
    """Costs of a user, and which policies are on the front of score (of users that change, if any) against tokens."""
    for case in cases:
        for name in COSTS:
            yield _whole(case.change, case.policy, "", "all", name, overall(case.costs, name, AMOUNT))
    groups = [set(case.adapters["users"]) for case in cases]
    users = "changed" if all("changed" in group for group in groups) else sorted(groups[0])[0]
    good = [overall(case.adapters[case.adapters["users"] == users], "good")[0] for case in cases]
    best = front([case.costs["tokens"].mean() for case in cases], good)
    for case, on in zip(cases, best, strict=True):
        yield (case.change, case.policy, "", users, "on the front", np.nan, np.nan, float(on), np.nan, np.nan, np.nan)


def _against(case: DriftCase, others: list[DriftCase], best: DriftCase | None) -> Iterator[tuple]:
    """Regret, decay, and what else the twin of a policy tells."""
    if best is not None and case is not best:
        for users, rows in paired(best.adapters, case.adapters).groupby("users"):
            yield _whole(case.change, case.policy, best.policy, str(users), "regret", overall(rows, "apart"))
    for fresh in others:
        if fresh_for(case.experiment, fresh.experiment):
            yield from _decay(fresh, case)
        if _twins(fresh.experiment, case.experiment):
            both = paired(fresh.adapters, case.adapters)
            for when, rows in (("before", both[both["since"] < 0]), ("after", both[both["since"] >= 0])):
                if len(rows):
                    name = f"held back {when} the change"
                    yield _whole(case.change, case.policy, fresh.policy, "changed", name, overall(rows, "apart"))
            for line in _lines(along(both[both["since"].notna()], "since", "apart", DAYS)):
                yield (case.change, case.policy, fresh.policy, "changed", "held back", *line)


def _decay(fresh: DriftCase, stale: DriftCase) -> Iterator[tuple]:
    both = paired(fresh.adapters, stale.adapters)
    for users, rows in both.groupby("users"):
        head = (stale.change, stale.policy, fresh.policy, str(users))
        for line in _lines(along(rows[rows["age"] <= reach(rows)], "age", "apart", DAYS)):
            yield (*head, "decay", *line)
        if stale.experiment.drift.kind in ("abrupt", "recurring") and rows["since"].notna().any():
            for line in _lines(along(rows, "since", "apart", DAYS)):
                yield (*head, "decay since the change", *line)


def _most_often(cases: list[DriftCase]) -> DriftCase | None:
    """What regret is measured against: the most often refreshed of those that train on nothing old."""
    plain = [case for case in cases if case.experiment.drift.samples == "refresh"]
    return min(plain, key=lambda case: (case.experiment.drift.every, case.experiment.population.max_history or np.inf),
               default=None)  # fmt: skip


def _twins(fresh: Experiment, kept: Experiment) -> bool:
    """Whether two policies ask on the same days, and `kept` alone, in one way, also uses something of earlier times."""
    return (
        fresh.drift.policy == "every" and _but_for_old(fresh) == _but_for_old(kept)
        and not any(_old(fresh)) and sum(_old(kept)) == 1
    )  # fmt: skip


def _old(experiment: Experiment) -> tuple[bool, bool, bool]:
    """What an adapter has of earlier times: samples, all items of history, the adapter before it."""
    drift, population, training = experiment.drift, experiment.population, experiment.training
    return drift.samples != "refresh", not population.max_history, training.start == "continue"


def _but_for_old(experiment: Experiment) -> tuple[Section, ...]:
    changes = {"drift": {"samples": "refresh"}, "population": {"max_history": 0}, "training": {"start": "anew"}}
    return tuple(getattr(experiment, name).model_copy(update=update) for name, update in changes.items())


def _whole(change: str, policy: str, reference: str, users: str, name: str, found: tuple) -> tuple:
    return (change, policy, reference, users, name, np.nan, np.nan, *found)


def _lines(curve: pd.DataFrame) -> Iterator[tuple]:
    return curve.itertuples(index=False, name=None)
