"""The findings of the study `drift`: sentences made of its table's numbers, also of those that show nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from untether.sim.experiment import Experiment

UNCHANGED = "unchanged"
"""Users who do not change, as the table calls them."""

WORLD = (
    "The users are those of the embedded world: who changed, when, and what they would have said before is known. It "
    "is a mechanism check; how fast real people change, it cannot say. Costs are those of the nominal model."
)
REAL = (
    "The users are real. Nobody knows when one changed, so a detector's delay and false alarms, and what is remembered "
    "of a former self, cannot be measured; an adapter's decay mixes a change of the person with a change of what there "
    "is to write about. A day here is a round, which stands for {days:g} days of the calendar. Costs are those of the "
    "nominal model."
)


def sentences(table: pd.DataFrame, experiment: Experiment) -> tuple[list[str], list[str]]:
    """Returns (findings, notes) from the study's table; `experiment` is one of its cells."""
    found = [
        sentence
        for change, own in table.groupby("change", sort=False)
        for part in (_decay, _half_life, _regret, _front, _detector, _memory, _held_back)
        for sentence in part(str(change), own)
    ]
    population = experiment.population
    return found, [WORLD if population.source == "world" else REAL.format(days=population.round_days)]


def _informative(rows: pd.DataFrame, names: list[str]) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """The groups of rows, of users who do not change the first alone: they show the effect of age alone."""
    shown = False
    for place, group in rows.groupby(names, sort=False):
        if place[-1] != UNCHANGED or not shown:
            yield place, group
        shown = shown or place[-1] == UNCHANGED


def _decay(change: str, own: pd.DataFrame) -> Iterator[str]:
    """Decay at the first and the last age, and from when on it is clear of zero."""
    rows = own[own["measure"] == "decay"]
    for (fresh, stale, users), line in _informative(rows, ["reference", "policy", "users"]):
        line = line[line["to"] > 0].sort_values("from")
        if line.empty:
            yield f"{change}, {users} users: hardly anybody asked a stale adapter (`{stale}`); its decay is not known."
            continue
        clear = line[(line["low"] > 0)[::-1].cummin()[::-1]]  # from there to the end
        when = f"clear of zero from day {clear.iloc[0]['from']:.0f} on" if len(clear) else "not shown to be a loss"
        last = line.iloc[-1]
        yield (
            f"{change}, {users} users: at an age of {_span(last)} days a stale adapter "
            f"(`{stale}`) has lost {_value(last)} against `{fresh}` on the same queries; {when}."
        )


def _half_life(change: str, own: pd.DataFrame) -> Iterator[str]:
    rows = own[own["measure"] == "half-life"]
    for row in (row for _, some in _informative(rows, ["policy", "users"]) for row in some.itertuples()):
        head = f"{change}, {row.users} users: half of the gain of `{row.policy}` over the base model is gone "
        if np.isnan(row.value):
            what = "is not shown to have a gain over the base model that could halve"
            yield f"{change}, {row.users} users: `{row.policy}` {what}."
        elif np.isinf(row.value):
            low = f"; the interval begins at {row.low:.1f} days" if np.isfinite(row.low) else ""
            yield f"{head}at no age up to {row.to:.0f} days (not reached{low})."
        else:
            high = f"{row.high:.1f}" if np.isfinite(row.high) else "not reached"
            yield f"{head}after {row.value:.1f} days [{row.low:.1f}, {high}]."


def _regret(change: str, own: pd.DataFrame) -> Iterator[str]:
    rows = own[own["measure"] == "regret"]
    for (users, best), line in rows.groupby(["users", "reference"], sort=False):
        if users == UNCHANGED and rows["users"].nunique() > 1:
            continue  # the table has them
        regrets = ", ".join(f"`{row.policy}` {_value(row)}" for row in line.itertuples())
        yield f"{change}, {users} users: regret against `{best}`, score an answer: {regrets}."


def _front(change: str, own: pd.DataFrame) -> Iterator[str]:
    rows = own[own["measure"] == "on the front"]
    tokens = own[own["measure"] == "tokens"].set_index("policy")["value"]
    best = sorted(rows.loc[rows["value"] == 1, "policy"], key=tokens.get)
    beaten = sorted(rows.loc[rows["value"] == 0, "policy"], key=tokens.get)
    priced = ", ".join(f"`{policy}` ({tokens[policy] / 1000:.1f}k tokens a user)" for policy in best)
    rest = f"; beaten: {', '.join(f'`{policy}`' for policy in beaten)}" if beaten else ""
    yield f"{change}: on the front of score against cloud tokens are {priced}{rest} (by means; see the intervals)."


def _detector(change: str, own: pd.DataFrame) -> Iterator[str]:
    for policy, rows in own.groupby("policy", sort=False):
        named = rows.set_index(["measure", "users"])[["value", "low", "high", "n_users"]]
        alarms = named[named.index.get_level_values("measure") == "raised a false alarm"]
        if ("detected", "changed") in named.index:
            share, delay = named.loc[("detected", "changed")], named.loc[("delay", "changed")]
            days = f", {_days(delay)} after it (mean of those)" if delay["n_users"] else ""
            yield (
                f"{change}: `{policy}` asked again after the change of {share['value']:.0%} of {share['n_users']:.0f} "
                f"changed users{days}."
            )
        for (_, users), row in alarms.iterrows():
            rate = named.loc[("false alarms in 100 days", users), "value"]
            share = f"{row['value']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
            yield (
                f"{change}: `{policy}` raised a false alarm for {share} of {row['n_users']:.0f} "
                f"{users} users ({rate:.1f} in 100 days of a user)."
            )


def _memory(change: str, own: pd.DataFrame) -> Iterator[str]:
    """Old and new gold in the last days, a policy a clause."""
    rows = own[own["measure"].str.match("score on the (before|now) gold")]
    clauses = []
    for policy, lines in rows.groupby("policy", sort=False):
        last = lines.sort_values("from").groupby("measure").last()
        now, before = last.loc["score on the now gold"], last.loc["score on the before gold"]
        clauses.append(f"`{policy}` {_value(now, '')} and {_value(before, '')}")
    if clauses:
        days = f"{_span(now)} days after the change began"
        yield f"{change}: {days}, scored on what the user says now and on what they said before: {', '.join(clauses)}."


def _held_back(change: str, own: pd.DataFrame) -> Iterator[str]:
    rows = own[own["measure"] == "held back after the change"]
    for row in rows.itertuples():
        before = own[(own["measure"] == "held back before the change") & (own["policy"] == row.policy)]
        verdict = "held back" if row.low > 0 else "helped" if row.high < 0 else "not shown to be held back or helped"
        also = f" (before it {_value(before.iloc[0])})" if len(before) else ""
        yield (
            f"{change}: after the change, `{row.reference}` scores {_value(row)} more than `{row.policy}`{also}: "
            f"with what it has of earlier times the user is {verdict}."
        )


def _value(row: Any, sign: str = "+") -> str:
    value, low, high = (format(getattr(row, name), f"{sign}.3f") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _span(row: pd.Series) -> str:
    first, last = f"{row['from']:.0f}", f"{row['to']:.0f}"
    return first if first == last else f"{first} to {last}"


def _days(row: pd.Series) -> str:
    return f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}] days"
