"""The figures of the study `drift`, from its table alone."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from untether.sim.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, style

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Drawn = tuple[Figure, str]
"""A figure and its caption."""


def draw(table: pd.DataFrame) -> dict[str, Drawn]:
    """Draws the figures that the table has numbers for, by name.

    They show the loss with age, the remaining gain, scores by day, what is remembered, and the costs.
    """
    with style():
        made = {
            "1-decay": _decay(table), "2-gain": _gain(table), "3-days": _days(table), "4-memory": _memory(table),
            "5-price": _price(table),
        }  # fmt: skip
    return {name: drawn for name, drawn in made.items() if drawn is not None}


def _decay(table: pd.DataFrame) -> Drawn | None:
    """A panel a change; by age or, where users change all at once, by days since."""
    since = table[table["measure"] == "decay since the change"]
    aged = table[(table["measure"] == "decay") & ~table["change"].isin(since["change"])]
    own = pd.concat([aged, since])
    if own.empty:
        return None
    figure, panels = _panels(own)
    for axis, change in zip(panels, own["change"].unique(), strict=True):
        here = own[own["change"] == change]
        by_day = (here["measure"] == "decay since the change").any()
        axis.axhline(0, color=FAINT, linewidth=0.7)
        if by_day:
            axis.axvline(0, color=FAINT, linewidth=0.7, linestyle=(0, (4, 3)))
            here = here[here["measure"] == "decay since the change"]
        for number, (words, line) in enumerate(here.groupby(["reference", "policy", "users"], sort=False)):
            fresh, stale, users = words
            _line(axis, line, number, f"{_words(fresh)} − {_words(stale)}{_of(users)}", users == "unchanged")
        axis.set_xlabel("days since the change" if by_day else "age of the stale adapter (days)")
        axis.legend(frameon=False, fontsize=6.5, handlelength=1.6)
    panels[0].set_ylabel("score lost by staying stale (95% CI)")
    figure.tight_layout()
    return figure, "What age costs: fresh minus stale adapter on the same queries; above zero the stale one is worse."


def _gain(table: pd.DataFrame) -> Drawn | None:
    own = table[table["measure"] == "gain by age"]
    if own.empty:
        return None
    figure, panels = _panels(own)
    for axis, change in zip(panels, own["change"].unique(), strict=True):
        axis.axhline(0, color=FAINT, linewidth=0.7)
        for number, (words, line) in enumerate(own[own["change"] == change].groupby(["policy", "users"], sort=False)):
            policy, users = words
            _line(axis, line, number, f"{_words(policy)}{_of(users)}", users == "unchanged")
            half = _half_life(table, change, *words)
            if half is not None and np.isfinite(half["value"]):
                axis.axvline(half["value"], color=_COLOURS[number], linewidth=0.8, linestyle=(0, (2, 2)))
        axis.set_xlabel("age of the adapter (days)")
        axis.legend(frameon=False, fontsize=6.5, handlelength=1.6)
    panels[0].set_ylabel("gain over the base model (95% CI)")
    figure.tight_layout()
    return figure, "What is left of the gain over the base model, by the adapter's age; dotted: half of it is gone."


def _days(table: pd.DataFrame) -> Drawn | None:
    own = table[(table["measure"] == "score by day") & (table["users"] != "unchanged")]
    if own.empty:
        own = table[table["measure"] == "score by day"]
    figure, panels = _panels(own)
    for axis, change in zip(panels, own["change"].unique(), strict=True):
        for number, (policy, line) in enumerate(own[own["change"] == change].groupby("policy", sort=False)):
            _line(axis, line, number, _words(policy), band=False)
        axis.set_xlabel("day")
    panels[0].set_ylabel("score (right is up)")
    panels[-1].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure, "Score of the adapters' answers by day, users who change, a line a policy."


def _memory(table: pd.DataFrame) -> Drawn | None:
    """A panel a change, a colour a policy: the old gold dashed, the new one solid."""
    own = table[table["measure"].str.match("score on the (before|now) gold")]
    if own.empty:
        return None
    figure, panels = _panels(own)
    for axis, change in zip(panels, own["change"].unique(), strict=True):
        axis.axvline(0, color=FAINT, linewidth=0.7, linestyle=(0, (4, 3)))
        here = own[own["change"] == change]
        for number, (policy, lines) in enumerate(here.groupby("policy", sort=False)):
            for measure, line in lines.groupby("measure", sort=False):
                old = "before" in measure
                _line(axis, line, number, "" if old else _words(policy), dashed=old, band=False)
        axis.set_xlabel("days since the change")
    panels[0].set_ylabel("score (right is up)")
    panels[-1].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure, "What adapters remember: scored on what users say now (solid) and would have said before (dashed)."


def _price(table: pd.DataFrame) -> Drawn | None:
    """Score against cloud tokens; a line joins the policies that no other one beats in both."""
    fronts = table[table["measure"] == "on the front"]
    figure, panels = _panels(fronts)
    for axis, (change, own) in zip(panels, fronts.groupby("change", sort=False), strict=True):
        points = []
        for number, row in enumerate(own.itertuples()):
            here = (table["change"] == change) & (table["policy"] == row.policy)
            tokens = table[here & (table["measure"] == "tokens")].iloc[0]["value"] / 1000
            good = table[here & (table["measure"] == "score") & (table["users"] == row.users)].iloc[0]
            spread = [[good["value"] - good["low"]], [good["high"] - good["value"]]]
            axis.errorbar(
                tokens, good["value"], yerr=np.nan_to_num(spread), color=_COLOURS[number % len(_COLOURS)],
                marker=_MARKERS[number % len(_MARKERS)], markersize=5, elinewidth=0.8, linestyle="none",
                markerfacecolor=None if row.value else "none", label=_words(row.policy), zorder=3,
            )  # fmt: skip
            if row.value:
                points.append((tokens, good["value"]))
        axis.plot(*zip(*sorted(points), strict=True), color=FAINT, linewidth=0.9, drawstyle="steps-post", zorder=1)
        axis.set_xlabel("cloud tokens of a user (thousands)")
    panels[0].set_ylabel("score (95% CI, right is up)")
    panels[-1].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure, "What a policy is worth and costs. Filled, on the line: no other policy is both better and cheaper."


# --- common --------------------------------------------------------------------------------------------------------


def _panels(own: pd.DataFrame) -> tuple[Figure, list[Axes]]:
    changes = list(own["change"].unique())
    figure, axes = plt.subplots(1, len(changes), figsize=(1.2 + 2.9 * len(changes), 2.6), sharey=True, squeeze=False)
    for axis, change in zip(axes[0], changes, strict=True):
        axis.set_title(_words(change))
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _line(
    axis: Axes, line: pd.DataFrame, number: int, label: str, dashed: bool = False, band: bool = True
) -> None:
    middle = (line["from"] + line["to"]) / 2
    colour = _COLOURS[number % len(_COLOURS)]
    axis.plot(middle, line["value"], color=colour, marker=_MARKERS[number % len(_MARKERS)], markersize=3, linewidth=1.1,
              linestyle=(0, (4, 2)) if dashed else "-", label=label or None)  # fmt: skip
    if band:
        axis.fill_between(middle, line["low"].astype(float), line["high"].astype(float), color=colour, alpha=0.15,
                          linewidth=0)  # fmt: skip


def _half_life(table: pd.DataFrame, change: str, policy: str, users: str) -> pd.Series | None:
    where = (table["change"] == change) & (table["policy"] == policy) & (table["users"] == users)
    found = table[where & (table["measure"] == "half-life")]
    return None if found.empty else found.iloc[0]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _of(users: str) -> str:
    return {"unchanged": ", unchanged users", "real": ""}.get(users, "")
