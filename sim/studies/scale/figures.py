"""The figures of the study `scale`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from untether.sim.population.tasks import get_task
from untether.sim.report.figures import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, style
from untether.sim.report.summary import metric_name
from untether.sim.studies.scale.prose import exponent, items

_COLOURS, _MARKERS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY), ("o", "s", "^", "D", "v", "P")


def draw_simulation(cells: pd.DataFrame) -> Figure:
    """Draws seconds, processor seconds and memory against the size of the fleet, with the fitted power."""
    cold = cells[cells["cold"] & (cells["learners"] == cells["devices"])].sort_values("devices")
    panels = (("wall_s", "seconds"), ("cpu_s", "processor seconds"), ("peak_memory_gib", "peak memory (GiB)"))
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.2))
        for axis, (name, label), colour, marker in zip(axes, panels, _COLOURS, _MARKERS, strict=False):
            axis.plot(cold["devices"], cold[name], color=colour, marker=marker, markersize=4, linewidth=1.1)
            power, factor = exponent(cells, name)
            if np.isfinite(power):
                x = np.array([cold["devices"].min(), cold["devices"].max()])
                axis.plot(x, factor * x**power, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
                axis.set_title(f"exponent {power:.2f}")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylabel(label)
            axis.set_xlabel("devices")
            _plain(axis)
        figure.tight_layout()
    return figure


def draw_service(cells: pd.DataFrame) -> Figure:
    """Draws waits in the cloud's queue and, below, the hours until shares of the devices have an adapter."""
    above = (("queued_p50_s", "median wait (s)"), ("queued_p95_s", "95th percentile (s)"),
             ("queued_p99_s", "99th percentile (s)"))  # fmt: skip
    below = (("h_to_50", "half of the devices (h)"), ("h_to_90", "90% (h)"), ("h_to_99", "99% (h)"))
    with style():
        figure, axes = plt.subplots(2, 3, figsize=(7.0, 4.1), sharex=True, sharey="row")
        for row, names in zip(axes, (above, below), strict=True):
            for axis, (name, label) in zip(row, names, strict=True):
                for number, (cloud, own) in enumerate(cells.groupby("cloud", sort=False)):
                    own = own.sort_values("devices")
                    shown = own[name].where(np.isfinite(own[name]))
                    axis.plot(
                        own["devices"], shown, color=_COLOURS[number % 6], marker=_MARKERS[number % 6], markersize=4,
                        linewidth=1.1, label=str(cloud),
                    )  # fmt: skip
                axis.set_xscale("log")
                axis.set_title(label)
                _plain(axis)
        axes[0][0].set_yscale("symlog", linthresh=1.0)
        axes[0][0].set_ylabel("in the cloud's queue")
        axes[1][0].set_ylabel("until personalized")
        axes[1][0].set_ylim(bottom=0)
        for axis in axes[1]:
            axis.set_xlabel("devices")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def draw_quality(quality: pd.DataFrame) -> Figure:
    """Draws a panel a task: gain over the frozen base by the length of the history, a line an arm."""
    tasks = sorted(quality["task"].unique())
    with style():
        figure, axes = plt.subplots(1, len(tasks), figsize=(0.7 + 2.9 * len(tasks), 2.4), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            axis.axhline(0, color=INK, linewidth=0.7)
            for number, (arm, own) in enumerate(quality[quality["task"] == task].groupby("arm", sort=False)):
                x = np.arange(len(own)) + 0.08 * (number - 0.5)
                spread = np.stack([own["gain"] - own["low"], own["high"] - own["gain"]])
                axis.errorbar(x, own["gain"], yerr=spread, color=_COLOURS[number], marker=_MARKERS[number],
                              markersize=4, linewidth=1.1, elinewidth=0.8, label=arm)  # fmt: skip
                axis.set_xticks(range(len(own)), [items(row) for row in own.itertuples()])
            axis.set_title(f"{task.replace('_', '-')} ({metric_name(get_task(task).primary)}; above zero is better)")
            axis.set_xlabel("items in the user's history")
            _plain(axis)
        axes[0][0].set_ylabel("gain over the frozen base (95% CI)")
        axes[0][0].legend(frameon=False, loc="upper left")
        figure.tight_layout()
    return figure


def _plain(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log":
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if side is axis.yaxis else (1.0,)))
            side.set_minor_formatter(NullFormatter())
