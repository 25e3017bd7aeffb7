"""The figures of a run, as SVG and PDF a paper can use: what the contrasts say, and what the filters let through.

The same data give the same bytes: fonts that come with matplotlib, salted ids, no dates. Colours are Okabe and Ito's,
which colour-blind readers can tell apart, and no meaning is carried by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from untether.sim.core.durable import write_atomically
from untether.sim.experiment.arms import NON_INFERIORITY, PRIMARY
from untether.sim.population.tasks import higher_is_better
from untether.sim.report.funnel import Funnel
from untether.sim.report.summary import Contrast, Summary, metric_name, title

#: Ink is one colour of its own, and so is the gap between bars: the report turns them into the page's own colours.
INK, FAINT, PAPER = "#1a1a1a", "#8a8a8a", "#fefefd"
BLUE, ORANGE, GREEN, YELLOW, SKY, PURPLE, VERMILION = (
    "#0072B2", "#E69F00", "#009E73", "#F0E442", "#56B4E9", "#CC79A7", "#D55E00",
)  # fmt: skip
_STYLE = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.labelsize": 9,
    "axes.titlesize": 9.5, "xtick.labelsize": 8, "ytick.labelsize": 9, "legend.fontsize": 8, "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "untether", "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.0,
    "savefig.transparent": True, "figure.dpi": 100, "axes.unicode_minus": True,
}  # fmt: skip


_TIGHT = {"bbox_inches": "tight", "pad_inches": 0.04}


@contextmanager
def style():
    """Gives every figure its look of the project; matplotlib's own settings come back afterwards."""
    with matplotlib.rc_context(_STYLE):
        yield


def bare(axis: plt.Axes, grid: Literal["x", "y"] = "y") -> None:
    """Leaves no frame beside the axes that are read, and a faint grid."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis=grid, color=FAINT, alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)


def save(figure: Figure, folder: Path, name: str, title: str = "") -> str:
    """Writes `name.svg` and `name.pdf` reproducibly, with a title for those who cannot see them; closes the figure and
    returns the SVG's text.
    """
    told = {"Creator": "untether", **({"Title": title} if title else {})}
    with style():
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, **told}, **_TIGHT)
        figure.set_layout_engine("none")  # both forms stand as the first one was laid out
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, **told}, **_TIGHT)
    plt.close(figure)
    write_atomically(folder / f"{name}.svg", text.getvalue())
    return text.getvalue()


def forest(summary: Summary, narrow: bool = False) -> Figure | None:
    """Returns the contrasts by task, gain and 95% interval, a panel a contrast; None where the run compared nothing.

    Filled: significant after Holm (primary contrasts) or not worse than the margin (against the cloud). A task whose
    metric is an error is turned, so that right is better everywhere. `narrow`: the panels stand below each other, for a
    column of text or a phone.
    """
    contrasts = [contrast for contrast in summary.contrasts() if contrast.gain is not None]
    panels = [pair for pair in (*PRIMARY, *NON_INFERIORITY) if any((c.arm, c.reference) == pair for c in contrasts)]
    if not panels:
        return None
    tasks = [task for task in summary.tasks if any(c.task == task for c in contrasts)]
    with style():
        rows, columns = (len(panels), 1) if narrow else (1, len(panels))
        high = 0.5 + (0.5 + 0.4 * len(tasks)) * rows if narrow else 0.85 + 0.44 * len(tasks)
        size = (3.4 if narrow else 1.5 + 1.9 * columns, high)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        axes = axes.reshape(1, -1)
        for axis, (arm, reference) in zip(axes[0], panels, strict=True):
            own = {c.task: c for c in contrasts if (c.arm, c.reference) == (arm, reference)}
            _forest_panel(axis, [own.get(task) for task in tasks])
            axis.set_title(f"against {reference.replace('_', ' ')}", pad=14)
        tested = [axis for axis, pair in zip(axes[0], panels, strict=True) if pair in PRIMARY]
        limits = [limit for axis in tested for limit in axis.get_xlim()]
        for axis in tested:
            axis.set_xlim(min(limits), max(limits))
        labels = [_task_label(summary, task) for task in tasks]
        for axis in axes[0]:  # panels below each other have their own
            axis.set_yticks(range(len(tasks)), labels, linespacing=1.25, fontsize=7 if narrow else 9)
        axes[0][0].set_ylim(len(tasks) - 0.5, -0.5)
        gap = "  " if narrow else "      "
        label = f"\N{LEFTWARDS ARROW} worse{gap}gain of collaborative (95% CI){gap}better \N{RIGHTWARDS ARROW}"
        figure.supxlabel(label, fontsize=7.5 if narrow else 9)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03)
    return figure


def _forest_panel(axis: plt.Axes, contrasts: Sequence[Contrast | None]) -> None:
    axis.axvline(0, color=INK, linewidth=0.7, zorder=1)
    margins = [(row, c.margin) for row, c in enumerate(contrasts) if c is not None and c.margin is not None]
    for row, margin in margins:
        axis.vlines(-margin, row - 0.5, row + 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    if margins:
        axis.annotate("margin", (-margins[0][1], 1.0), xycoords=("data", "axes fraction"), xytext=(0, 1),
                      textcoords="offset points", ha="center", va="bottom", fontsize=7, color=FAINT)  # fmt: skip
    for row, contrast in enumerate(contrasts):
        if contrast is None or contrast.gain is None:
            continue
        colour = BLUE if contrast.gain >= 0 else VERMILION
        low = contrast.gain if contrast.gain_low is None else contrast.gain_low
        high = contrast.gain if contrast.gain_high is None else contrast.gain_high
        solid = contrast.significant if contrast.margin is None else contrast.not_worse
        axis.hlines(row, low, high, color=colour, linewidth=1.4, zorder=2)
        axis.plot(contrast.gain, row, marker="o", markersize=5.2, color=colour, markeredgewidth=1.2,
                  markerfacecolor=colour if solid else "none", zorder=3)  # fmt: skip
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.5)
    axis.locator_params(axis="x", nbins=4)
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0 - 0.04 * (high - low)), max(high, 0.04 * (high - low)))
    axis.tick_params(axis="y", length=0)


def _task_label(summary: Summary, task: str) -> str:
    metric = summary.primary(task)
    turned = "" if higher_is_better(metric) else ", turned"
    name = title(task) or task.replace("_", "-")
    return f"{name}\n{task.replace('_', '-')}, {metric_name(metric)}{turned}"


def filters(funnel: Funnel) -> Figure | None:
    """Returns what became of every sample asked for, a bar a task; None where the cloud was asked for nothing."""
    tasks = [task for task in funnel.tasks if funnel.asked(task)]
    if not tasks:
        return None
    colours = dict(zip(funnel.fates, _fate_colours(funnel.fates), strict=True))
    with style():
        figure, axis = plt.subplots(figsize=(6.8, 0.6 + 0.44 * len(tasks)))
        for row, task in enumerate(tasks):
            left, asked = 0.0, funnel.asked(task)
            for fate in funnel.fates:
                share = funnel.count(task, fate) / asked
                if share == 0:
                    continue
                axis.barh(row, share, left=left, height=0.62, color=colours[fate], edgecolor=PAPER, linewidth=0.8,
                          label=fate)  # fmt: skip
                if share >= 0.06:
                    dark = fate == "accepted" or fate.startswith("not received")
                    axis.text(left + share / 2, row, f"{funnel.count(task, fate)}", ha="center", va="center",
                              fontsize=7.5, color="#ffffff" if dark else "#1b1b1b")  # fmt: skip
                left += share
        labels = [f"{title(task) or task}\n{task.replace('_', '-')}, {funnel.asked(task)} asked" for task in tasks]
        axis.set_yticks(range(len(tasks)), labels, linespacing=1.25)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(tasks) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False,
                      handlelength=0.9, handletextpad=0.5, columnspacing=1.3, bbox_to_anchor=(0.5, 1.0))  # fmt: skip
        figure.tight_layout(pad=0.4)
    return figure


def _fate_colours(fates: Sequence[str]) -> list[str]:
    rejected = iter([ORANGE, SKY, PURPLE, YELLOW, VERMILION, "#bdbdbd", "#e0c28c"] * (len(fates) // 7 + 1))
    fixed = {"accepted": GREEN, "not received": "#6f6f6f"}
    return [fixed.get(fate) or next(rejected) for fate in fates]
