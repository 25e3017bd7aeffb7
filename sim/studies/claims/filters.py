"""The analysis `filters`: how well each filter tells faulty samples from sound ones, what adapters trained on what it
accepts are worth and cost, and how far filters and the reviewer agree.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import cohen_kappa_score, roc_auc_score, roc_curve

from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError
from untether.sim.core.records import LEAK, NOT_RECEIVED
from untether.sim.experiment.arms import FLOOR, METHOD
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.figures import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, VERMILION, style
from untether.sim.report.funnel import SOUND
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.frames import USER, Runs, each_cell, mean_interval, user_scores
from untether.sim.studies.study import Study

ACCEPTED = "accepted"
OPEN, REVIEWER = "open", "human"
KEY = ["seed", "round", "sample_id"]
_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes the table (a row a cell and task), `thresholds.csv` (a row a filter and threshold), `kinds.csv` (a row a
    cell and kind of fault), figures and findings. Raises UserError where nobody knows what samples were.
    """
    samples = {cell.name: of_samples(run.read("samples")) for cell, run in each_cell(study, runs)}
    if all(frame["fault"].isna().all() for frame in samples.values()):
        raise UserError(f"{study.spec.name}: no sample's truth is known. It needs the embedded world's cloud")
    names = {cell.name: " ".join(cell.words.values()) for cell in study.cells}
    points = measure(study, runs, samples)
    curves = {name: one for cell, frame in samples.items() if names[cell] in (OPEN, REVIEWER)
              for name, one in scores_of(frame).items()}  # fmt: skip
    swept = thresholds(curves)
    write_table(out, points)
    for name, frame in (("thresholds", swept), ("kinds", kinds(samples, names))):
        text = io.StringIO()
        frame.to_csv(text, index=False, float_format="%.4f")
        write_atomically(out / f"{name}.csv", text.getvalue())
    if curves:
        save_figure(out, "1-roc", draw_roc(curves), "Faults caught against sound samples lost, by filter")
    save_figure(out, "2-frontier", draw_frontier(points), "Gain over the frozen base against what the cloud was asked")
    write_findings(study, out, findings(points, curves, kinds(samples, names)))


def of_samples(samples: pd.DataFrame) -> pd.DataFrame:
    """Returns what devices received, with `fault` (1: faulty, by the world's truth; NaN: unknown), `passed` and all
    scores.
    """
    frame = samples[~samples["verdict"].isin([LEAK, NOT_RECEIVED])].copy()
    frame["fault"] = np.where(frame["truth"].isna(), np.nan, (frame["truth"] != SOUND).astype(float))
    frame["passed"] = frame["verdict"] == ACCEPTED
    return frame


def measure(study: Study, runs: Runs, samples: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Returns a row a cell and task: of what was turned away, the share that is faulty (`precision`); of the faults,
    the share turned away (`recall`); of the sound, the share lost (`lost`); the gain of `collaborative` over the frozen
    base, and the cloud's tokens a device; agreement with the reviewer, as a share and as Cohen's kappa.
    """
    reviewed = next((samples[cell.name] for cell in study.cells if REVIEWER in cell.words.values()), None)
    rows = []
    for cell, run in each_cell(study, runs):
        scores, events = user_scores(run.read("predictions")), run.read("events")
        asked = events[events["kind"] == "augment"]
        devices = cell.experiment.population.users * len(cell.experiment.seeds)
        tokens = float(asked[["tokens_in", "tokens_out"]].fillna(0).sum().sum()) / devices
        for task, own in samples[cell.name].groupby("task"):
            sign = 1.0 if higher_is_better(get_task(str(task)).primary) else -1.0
            wide = scores[scores["task"] == task].pivot(index=USER, columns="arm", values="score")
            gain, low, high = mean_interval(sign * (wide[METHOD] - wide[FLOOR]).dropna())
            row = {**cell.words, "task": task, "received": len(own), "accepted": int(own["passed"].sum()), **rates(own)}
            row |= {"gain": gain, "low": low, "high": high, "users": len(wide), "tokens": tokens}
            rows.append(row | agreement(own, reviewed))
    return pd.DataFrame(rows)


def rates(samples: pd.DataFrame) -> dict[str, float]:
    """Returns precision, recall and sound samples lost, of those whose truth is known."""
    known = samples.dropna(subset=["fault"])
    faulty, out = known["fault"] == 1, ~known["passed"]
    share = {"precision": (faulty, out), "recall": (out, faulty), "lost": (out, ~faulty)}
    return {name: float(hits[among].mean()) if among.any() else np.nan for name, (hits, among) in share.items()}


def agreement(samples: pd.DataFrame, reviewed: pd.DataFrame | None) -> dict[str, float]:
    """Returns how far what a cell accepted is what the reviewer accepted of the same samples: share, and Cohen's kappa.
    """
    if reviewed is None:
        return {}
    both = samples.set_index(KEY)["passed"].to_frame("filters").join(reviewed.set_index(KEY)["passed"], how="inner")
    if both.empty:
        return {"agreement": np.nan, "kappa": np.nan}
    varies = both.nunique().max() > 1
    kappa = cohen_kappa_score(both["filters"], both["passed"]) if varies else np.nan
    return {"agreement": float((both["filters"] == both["passed"]).mean()), "kappa": float(kappa)}


def scores_of(samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns by filter: `suspicion`, higher for what the filter likes less, and `fault`, of samples whose truth is
    known. A sample without a score is suspected least.
    """
    known = samples.dropna(subset=["fault"])
    extra = pd.DataFrame([json.loads(text) if text else {} for text in known["scores"]], index=known.index)
    likes = {
        "semantic": known["semantic"], "diversity": known["diversity"],
        "length": -np.abs(np.log(known["length_ratio"].astype(float).clip(lower=0.05))), **dict(extra.items()),
    }  # fmt: skip
    found = {}
    for name, liked in likes.items():
        values = pd.to_numeric(liked, errors="coerce")
        if values.notna().any():
            suspicion = (-values).fillna((-values).min() - 1.0)
            found[str(name)] = pd.DataFrame({"suspicion": suspicion, "fault": known["fault"], "score": values})
    return found


def auc(curve: pd.DataFrame) -> float:
    """Returns the area under a filter's ROC: how often it suspects a faulty sample more than a sound one (0.5: as by
    luck).
    """
    return float(roc_auc_score(curve["fault"], curve["suspicion"])) if curve["fault"].nunique() == 2 else np.nan


def thresholds(curves: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Returns a row a filter and threshold (at most 40 a filter): faults caught, sound samples lost, precision."""
    rows = []
    for name, curve in curves.items():
        if curve["fault"].nunique() < 2:
            continue
        for value in np.unique(np.quantile(curve["suspicion"], np.linspace(0, 1, 40))):
            out, faulty = curve["suspicion"] >= value, curve["fault"] == 1
            shares = (out[faulty].mean(), out[~faulty].mean(), faulty[out].mean())
            rows.append((name, -value, *map(float, shares)))
    return pd.DataFrame(rows, columns=["filter", "threshold", "recall", "lost", "precision"])


def kinds(samples: dict[str, pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """Returns a row a cell and true kind of sample: how many there were, and the share that was turned away."""
    rows = [
        (names[cell], kind, len(group), float((~group["passed"]).mean()))
        for cell, frame in samples.items() for kind, group in frame.dropna(subset=["truth"]).groupby("truth")
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["filters", "truth", "samples", "turned_away"])


def frontier(points: pd.DataFrame) -> pd.DataFrame:
    """Returns the cells that no other beats: none has at least their gain for at most their tokens, and more of one."""
    best = points.groupby("filters", sort=False)[["gain", "tokens"]].mean().drop(index=OPEN, errors="ignore")
    beaten = [
        ((best["gain"] >= row.gain) & (best["tokens"] <= row.tokens)
         & ((best["gain"] > row.gain) | (best["tokens"] < row.tokens))).any()
        for row in best.itertuples()
    ]  # fmt: skip
    return best[~np.array(beaten, dtype=bool)].sort_values("tokens")


def findings(points: pd.DataFrame, curves: dict[str, pd.DataFrame], by_kind: pd.DataFrame) -> Iterator[str]:
    """Sentences that follow the numbers."""
    areas = sorted(((auc(curve), name) for name, curve in curves.items()), reverse=True)
    if areas:
        yield "Faulty against sound samples, area under the ROC: " + ", ".join(f"{n} {a:.2f}" for a, n in areas) + "."
    for name, own in points[points["filters"] != OPEN].groupby("filters", sort=False):
        gains = ", ".join(f"{r.task} {r.gain:+.3f} [{r.low:+.3f}, {r.high:+.3f}]" for r in own.itertuples())
        mean, caught = own.mean(numeric_only=True), by_kind[by_kind["filters"] == name]
        some = caught[(caught["truth"] != SOUND) & (caught["turned_away"] >= 0.5)]["truth"]
        said = f"turns away {mean['recall']:.0%} of the faults and {mean['lost']:.0%} of the sound samples"
        said += f" (most of {', '.join(some)})" if len(some) else ""
        agrees = f"; agrees with the reviewer on {mean['agreement']:.0%} (kappa {mean['kappa']:.2f})"
        other = agrees if "agreement" in mean and name != REVIEWER and np.isfinite(mean["kappa"]) else ""
        yield f"`{name}` {said}; gain over the frozen base: {gains}; {mean['tokens']:.0f} tokens of the cloud{other}."
    front = frontier(points)
    best = [f"`{row.Index}` ({row.gain:+.3f} on average, {row.tokens:.0f} tokens)" for row in front.itertuples()]
    yield f"No other choice has at least the gain for at most the tokens of: {', '.join(best)}."


def draw_roc(curves: dict[str, pd.DataFrame]) -> Figure:
    """Returns one panel: recall of faults against sound samples lost, a line a filter."""
    with style():
        figure, axis = plt.subplots(figsize=(3.4, 3.2))
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.7)
        for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
            if curve["fault"].nunique() == 2:
                lost, caught, _ = roc_curve(curve["fault"], curve["suspicion"])
                axis.plot(lost, caught, color=colour, linewidth=1.2, label=f"{name} {auc(curve):.2f}")
        axis.set_xlabel("sound samples turned away")
        axis.set_ylabel("faulty samples turned away")
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
    return figure


def draw_frontier(points: pd.DataFrame) -> Figure:
    """Returns a panel a task: gain with its 95% interval against the cloud's tokens a device, a mark a cell."""
    tasks = list(dict.fromkeys(points["task"]))
    with style():
        figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 2.9), squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=True):
            own = points[(points["task"] == task) & (points["filters"] != OPEN)]
            for number, row in enumerate(own.itertuples()):
                colour = _COLOURS[number % len(_COLOURS)]
                spread = [[row.gain - row.low], [row.high - row.gain]]
                axis.errorbar(
                    [number], [row.gain], yerr=spread, marker="o", color=colour, markersize=3 + row.tokens / 4000
                )
            axis.axhline(0, color=FAINT, linewidth=0.7)
            axis.set_xticks(range(len(own)), own["filters"], rotation=60, ha="right")
            axis.set_title(str(task).replace("_", "-"))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("gain over frozen (95% CI)\nmarks grow with tokens")
        figure.tight_layout()
    return figure
