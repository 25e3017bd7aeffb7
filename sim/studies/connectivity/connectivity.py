"""The analysis `connectivity`: what devices keep of the cloud's help when they lose the cloud.

Reads the tables `predictions` and `events` of every cell. Quality is `collaborative` over `local`, paired by user: the
value of the cloud to a device that has its own data anyway. Every interval is over users (devices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.evaluation.resampling import AMOUNT, ANY, SHARE
from untether.sim.evaluation.statistics import clustered
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ALONE, FLOOR, METHOD
from untether.sim.population.tasks import get_task, higher_is_better
from untether.sim.report.summary import metric_name
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.connectivity.figures import (
    AVAILABILITY,
    AXES,
    BASE,
    FALLBACK,
    FRESH,
    GAP,
    KINDS,
    OVERDUE,
    OWN,
    draw_answerers,
    draw_costs,
    draw_gain,
    draw_survival,
    span,
)
from untether.sim.studies.frames import USER, Runs, each_cell, labelled, mean_interval
from untether.sim.studies.study import Study
from untether.sim.time.service import DEVICE, first_live, reached_s, survival, trainings, waiting_s, wasted
from untether.sim.time.timeline_state import REAL, STALE

ARM, REFERENCE = METHOD, ALONE
COSTS = ("bytes_wasted", "energy_j", "energy_wasted_j")


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv`, four figures and `findings.md`.

    Raises:
        UserError: An axis or an arm is missing.
    """
    missing = [f"axis {axis}" for axis in AXES if axis not in study.axes]
    missing += [f"arm {arm}" for arm in (ARM, REFERENCE, FLOOR) if arm not in study.cells[0].experiment.arms]
    if missing or len(study.axes) > len(AXES):
        needs = f"the axes {', '.join(AXES)} and no other, and the arms {ARM}, {REFERENCE}, {FLOOR}"
        raise UserError(f"{study.spec.name}: analysis connectivity needs {needs}. Missing: {', '.join(missing) or '-'}")
    users, points, curves = [], [], []
    for cell, run in each_cell(study, runs):
        parts = measure(cell.experiment, run.read("predictions"), run.read("events"))
        for frames, frame in zip((users, points, curves), parts, strict=True):
            frames.append(labelled(cell, frame))
    found = pd.concat(points, ignore_index=True)
    write_table(out, found)
    spread, lines = places(study, found), places(study, pd.concat(curves, ignore_index=True))
    save_figure(out, "1-gain", draw_gain(study, spread), _CAPTIONS["gain"])
    save_figure(out, "2-first-adapter", draw_survival(study, lines), _CAPTIONS["survival"])
    save_figure(out, "3-answered-by", draw_answerers(study, spread), _CAPTIONS["answerers"])
    save_figure(out, "4-costs", draw_costs(study, spread), _CAPTIONS["costs"])
    of_users = places(study, pd.concat(users, ignore_index=True))
    write_findings(study, out, findings(study, of_users, spread), [_NOTE])


def measure(
    experiment: Experiment, predictions: pd.DataFrame, events: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Measures one cell.

    Returns:
        A row a user and task (`by_user`), a row a task for the table, and the curve of devices without an adapter made
            with samples (`sim.time.service.survival`).
    """
    made = trainings(events, ARM)
    answers = label_answers(predictions, made, most_rounds(experiment))
    first = first_live(made[made["on"] != REAL], answers, experiment.rounds * DAY_S)
    curve, users = survival(first["time_s"], first["seen"]), by_user(answers)
    last, queued_s = curve.iloc[-1], waiting_s(events[events["kind"] == "augment"], (0.5, 0.95))
    costs = {
        "half_have_samples_d": reached_s(curve, 0.5) / DAY_S, "without_samples": last["share"],
        "without_samples_low": last["low"], "without_samples_high": last["high"],
        "queued_p50_s": queued_s[0.5], "queued_p95_s": queued_s[0.95],
    }
    devices = wasted(events, ARM).merge(answers[[*DEVICE, "cluster"]].drop_duplicates(), on=DEVICE)
    return users, pd.DataFrame([row | costs for row in _rows(users, devices)]), curve


def most_rounds(experiment: Experiment) -> float:
    """Returns the rounds after which the policy would have asked again: an older adapter is overdue. inf: never."""
    regular = experiment.drift.policy in ("every", "when_online", "budget")
    return float(experiment.drift.every) if regular else np.inf


def label_answers(predictions: pd.DataFrame, made: pd.DataFrame, most: float) -> pd.DataFrame:
    """Returns the answers with the `kind` of what answered (KINDS; of arm collaborative only) and `age_d`.

    `age_d` is the days since that adapter went live.

    Args:
        predictions: The table.
        made: As `sim.time.service.trainings` returns it.
        most: As `most_rounds` returns it.
    """
    rows = clustered(predictions)
    rows["age_d"] = (rows["answered_time_s"] - rows["adapter_time_s"]) / DAY_S
    own = (rows["arm"] == ARM) & (rows["answered_by"] == "adapter")
    found = pd.merge_asof(  # a time that was added up of two is a rounding error away
        rows[own].reset_index().sort_values("adapter_time_s"),
        made.rename(columns={"round": "made"}).sort_values("live_s"),
        left_on="adapter_time_s", right_on="live_s", by=DEVICE, direction="nearest", tolerance=1e-3,
    ).set_index("index")  # fmt: skip
    late = (found["on"] == STALE) | (found["round"] - found["made"] >= most)
    kind = pd.Series(np.where(found["on"] == REAL, OWN, np.where(late, OVERDUE, FRESH)), index=found.index)
    rows["kind"] = kind.where(found["on"].notna(), None).reindex(rows.index)
    rows.loc[(rows["arm"] == ARM) & ~own, "kind"] = BASE
    return rows


def by_user(answers: pd.DataFrame) -> pd.DataFrame:
    """Returns a row a user and task, with the columns of quality and of the answering adapters.

    `score` of the three arms (their names), `gain` over local (more is better), the share of questions answered by each
    kind, and `age_d` of the adapters that answered.
    """
    key = ["task", *USER]
    scores = answers.pivot_table(index=key, columns="arm", values="score")[[ARM, REFERENCE, FLOOR]]
    own = answers[answers["arm"] == ARM]
    shares = pd.crosstab([own[name] for name in key], own["kind"], normalize="index").reindex(columns=KINDS).fillna(0.0)
    frame = scores.join(shares).join(own.groupby(key)["age_d"].mean())
    sign = [1.0 if higher_is_better(get_task(task).primary) else -1.0 for task in frame.index.get_level_values("task")]
    frame["gain"] = np.array(sign) * (frame[ARM] - frame[REFERENCE])
    frame["gain_of_base"] = np.array(sign) * (frame[FLOOR] - frame[REFERENCE])
    return frame.reset_index()


def places(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """Returns labelled rows once for every place that their cell stands for, with the values in place of the words."""
    spots = pd.DataFrame([{"cell": cell.name, **spot} for cell in study.cells for spot in study.places(cell)])
    return frame.drop(columns=list(AXES)).merge(spots, on="cell")


def _rows(users: pd.DataFrame, devices: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A row a task: means over users, or devices, with their intervals."""
    for task, own in users.groupby("task"):
        row: dict[str, Any] = {"task": task, "metric": get_task(task).primary, "n_users": len(own)}
        known = own.set_index(USER)
        for name in (ARM, REFERENCE, FLOOR, "gain", "gain_of_base", *KINDS, "age_d"):
            bounds = SHARE if name in KINDS else AMOUNT if name == "age_d" else ANY
            found = mean_interval(known[name].dropna(), bounds)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
        for name in COSTS:
            found = mean_interval(devices.set_index("cluster")[name], AMOUNT)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
        sums = devices[["bytes", "bytes_wasted", "energy_j", "energy_wasted_j"]].sum()
        row["bytes_wasted_share"] = sums["bytes_wasted"] / sums["bytes"] if sums["bytes"] else np.nan
        row["energy_wasted_share"] = sums["energy_wasted_j"] / sums["energy_j"] if sums["energy_j"] else np.nan
        yield row


# --- in words -------------------------------------------------------------------------------------------------


def findings(study: Study, users: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    """Returns the sentences, from the rows of `by_user` and of the table at all places of the study."""
    gaps, fallbacks = study.values(GAP), study.values(FALLBACK)
    steps = sorted(study.values(AVAILABILITY), reverse=True)
    broken = [step for step in steps if 0 < step < 1]
    best, worst = steps[0], (broken or steps)[-1]
    sentences = []
    for task, own in users.groupby("task"):
        at = _at(own[own[FALLBACK] == fallbacks[0]])
        what = metric_name(get_task(task).primary)
        text = f"{task} ({what}, {len(at(best, gaps[0]))} users): at availability {best:g} `{ARM}` gains "
        text += f"{_signed(at(best, gaps[0]))} over `{REFERENCE}`; "
        changes = [
            f"{_signed(at(worst, gap) - at(best, gap))} with gaps of {span(gap)}"
            for gap in dict.fromkeys((gaps[0], gaps[-1]))
        ]
        text += f"at availability {worst:g} (fallback `{fallbacks[0]}`) that changes by {' and by '.join(changes)}."
        sentences.append(text)
        within = own[own[AVAILABILITY].isin(broken)]
        mean = {name: _gain(within[within[FALLBACK] == name]) for name in fallbacks}
        against = [f"`{name}` {_signed(mean[name] - mean[fallbacks[0]])}" for name in fallbacks[1:]]
        if against and broken:
            sentences.append(
                f"{task}: over all broken links, against falling back on `{fallbacks[0]}`: {', '.join(against)}."
            )
    rows = points[(points[FALLBACK] == fallbacks[0]) & (points["task"] == points["task"].min())]
    rows = rows.set_index([AVAILABILITY, GAP])
    told = [_coming(rows.loc[(step, gap)], step, gap) for step, gap in dict.fromkeys(
        [(best, gaps[0]), (worst, gaps[0]), (worst, gaps[-1])]
    )]  # fmt: skip
    return [*sentences, f"The first adapter made with the cloud's samples: {'; '.join(told)}."]


def _at(rows: pd.DataFrame) -> Callable[[float, float], pd.Series]:
    return lambda step, gap: _gain(rows[(rows[AVAILABILITY] == step) & (rows[GAP] == gap)])


def _gain(rows: pd.DataFrame) -> pd.Series:
    """The gain of each user, averaged over the places in the rows."""
    return rows.groupby(USER)["gain"].mean()


def _signed(per_user: pd.Series) -> str:
    mean, low, high = mean_interval(per_user.dropna())
    text = f"{mean + 0.0:+.3f} [{low + 0.0:+.3f}, {high + 0.0:+.3f}]"
    return text if low > 0 or high < 0 else f"{text} (no difference shown)"


def _coming(row: pd.Series, step: float, gap: float) -> str:
    where = f"at availability {step:g}" + (f" with gaps of {span(gap)}" if 0 < step < 1 else "")
    half = row["half_have_samples_d"]
    after = f"{half:.1f} days" if half >= 1 else f"{24 * half:.1f} hours"
    when = "most devices never had one" if np.isinf(half) else f"half of the devices had it after {after}"
    left, low, high = row["without_samples"], row["without_samples_low"], row["without_samples_high"]
    without = f"{left:.0%} [{low:.0%}, {high:.0%}] had none in the end" if left else "all in the end"
    return f"{where} {when}, {without}, and {row[FRESH]:.0%} of questions met a fresh one"


_NOTE = (
    "fresh: made with samples, not longer ago than the policy asks for new ones. stale: longer ago, or with samples of "
    "an earlier time. own_data: without samples. Wasted: attempts and trainings that did not end ok."
)
_CAPTIONS = {
    "gain": "Collaborative over local by availability and length of the gaps, paired by user, with 95% intervals.",
    "survival": "Share of devices that have had no adapter made with the cloud's samples yet (Kaplan-Meier, 95% band).",
    "answerers": f"Who answered the questions. {_NOTE}",
    "costs": "Age of the adapters that answered; bytes of attempts that came to nothing, energy of training and radio, "
    "and waits in the cloud's queue, all with the fallback named first. 95% intervals over devices.",
}
