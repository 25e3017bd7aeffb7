"""What happens over time: losses over a training's steps, outcomes and queues over the days, who had a link."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.clock import DAY_S, HOUR_S
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, METHOD, PRIMARY, ordered
from untether.sim.population.source import device_id
from untether.sim.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, YELLOW, bare, style
from untether.sim.time.network.links import Links

DRAWN = (METHOD, ALONE, *(reference for _, reference in PRIMARY))
"""The arms of the learning curves, the most telling ones."""

STRIPS = 40
"""Devices whose links are drawn."""

BINS = 48
"""Most intervals of time."""


def learning(training: pd.DataFrame) -> Figure | None:
    """Loss by optimizer step, the median over devices (and rounds) of each arm, with quartiles. None without rows."""
    arms = [arm for arm in ordered(training["arm"]) if arm in DRAWN] if len(training) else []
    if not arms:
        return None
    with style():
        figure, axis = plt.subplots(figsize=(5.4, 2.5), layout="constrained")
        for arm, colour, dash in zip(arms, (BLUE, ORANGE, VERMILION, GREEN), ("-", "--", "-.", ":"), strict=False):
            own = training[training["arm"] == arm]
            width = max(1, int(own["step"].max()) // 24)
            groups = own.groupby(own["step"] // width * width)["loss"]
            by_step = groups.quantile([0.25, 0.5, 0.75]).unstack()
            by_step = by_step[groups.size() >= groups.size().max() / 10]  # the last ones are of a few devices alone
            axis.plot(by_step.index, by_step[0.5], color=colour, linestyle=dash, label=arm.replace("_", " "))
            axis.fill_between(by_step.index, by_step[0.25], by_step[0.75], color=colour, alpha=0.12, linewidth=0)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss of the batch")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, ncols=2)
        bare(axis)
    return figure


def outcomes(events: pd.DataFrame) -> Figure | None:
    """Attempts at the cloud over virtual time by outcome and, where any waited, how long; None without attempts."""
    asked = events[events["kind"].isin(["augment", "answer"])] if len(events) else events
    asked = asked[asked["time_s"].notna()]
    if not len(asked):
        return None
    hours = asked["time_s"].to_numpy() / HOUR_S
    edges = np.linspace(hours.min(), hours.max() + 1e-6, min(BINS, max(4, len(np.unique(np.floor(hours))))) + 1)
    queued = asked["queued_s"].fillna(0.0).to_numpy() if "queued_s" in asked else np.zeros(len(asked))
    waits = bool((queued > 0).any())
    names = sorted(asked["outcome"].dropna().unique(), key=lambda name: (name != "ok", name))
    colours = [GREEN, *[ORANGE, VERMILION, PURPLE, SKY, YELLOW, FAINT] * (1 + len(names) // 6)]
    with style():
        figure, axes = plt.subplots(1 + waits, 1, figsize=(6.4, 2.1 + 1.3 * waits), sharex=True, squeeze=False,
                                    layout="constrained")  # fmt: skip
        below = np.zeros(len(edges) - 1)
        hatches = ["", "///", "...", "xxx", "\\\\\\", "++"] * (1 + len(names) // 6)
        for name, colour, hatch in zip(names, colours, hatches, strict=False):
            counts = np.histogram(hours[(asked["outcome"] == name).to_numpy()], edges)[0]
            axes[0][0].bar(edges[:-1], counts, np.diff(edges), below, align="edge", color=colour, hatch=hatch,
                           edgecolor="white", linewidth=0.2, label=name.replace("_", " "))  # fmt: skip
            below += counts
        axes[0][0].set_ylabel("attempts")
        axes[0][0].legend(frameon=False, ncols=min(4, len(names)), loc="lower left", bbox_to_anchor=(0, 1.0))
        if waits:
            place = np.clip(np.digitize(hours, edges) - 1, 0, len(edges) - 2)
            by_bin = pd.Series(queued).groupby(place).quantile([0.5, 0.95]).unstack()
            middle = (edges[:-1] + edges[1:])[by_bin.index] / 2
            axes[1][0].plot(middle, by_bin[0.5], color=BLUE, label="median")
            axes[1][0].plot(middle, by_bin[0.95], color=VERMILION, linestyle="--", label="95th percentile")
            axes[1][0].set_ylabel("s in the queue")
            axes[1][0].legend(frameon=False, ncols=2)
        axes[-1][0].set_xlabel("hours since the run's first midnight")
        for axis in axes.flat:
            bare(axis, "y")
    return figure


def availability(experiment: Experiment) -> Figure | None:
    """Returns when each of some devices had a link, a row a device, and the share of them above; None where all always
    had.
    """
    days = experiment.rounds
    try:
        links = Links(experiment.network, experiment.seeds[0], experiment.settings)
        fleet = [links.of(index, device_id(index)) for index in range(min(STRIPS, experiment.population.users))]
    except (UserError, OSError):  # traces that are not there any more
        return None
    step_s = max(600.0, days * DAY_S / 400)
    times = np.arange(0.0, days * DAY_S, step_s)
    up = np.array([[link.seconds_up(time, time + step_s) / step_s for time in times] for link in fleet])
    if up.min() >= 1:
        return None
    with style():
        figure, (share, strip) = plt.subplots(2, 1, figsize=(6.4, 1.2 + 0.055 * len(fleet) + 0.6), sharex=True,
                                              height_ratios=[1, 2.2], layout="constrained")  # fmt: skip
        extent = (0, days * 24, len(fleet), 0)
        strip.imshow(up, aspect="auto", extent=extent, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
        strip.set_ylabel("device")
        strip.set_xlabel("hours since the run's first midnight")
        share.plot(times / HOUR_S, up.mean(axis=0), color=INK, linewidth=0.9)
        share.set_ylim(0, 1.02)
        share.set_ylabel("share\nwith a link")
        bare(share, "y")
    return figure
