"""The analysis `away`: the cost of an absence from the cloud, by its length and by how fast the user changes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.clock import DAY_S, Span
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.population.tasks import get_task, unit
from untether.sim.report.figures import INK, style
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.drift.measures import overall, paired, read_answers
from untether.sim.studies.frames import Runs, each_cell
from untether.sim.studies.study import Study

COLUMNS = ["rate", "away", "days", "value", "low", "high", "n_users"]


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv`, a heat map and `findings.md`.

    Cells are compared with those without an outage at the same rate of change.
    """
    table, days = losses(study, runs)
    write_table(out, table)
    caption = (
        f"Score lost by an absence, in {days}: against the same user's device that never lost its link. Bold: the 95% "
        "interval is above zero."
    )
    save_figure(out, study.spec.name, draw(table), caption)
    experiment = next(iter(runs.values())).experiment
    rated = {unit(get_task(task).primary) for task in experiment.population.tasks} == {"stars"}
    margin = experiment.evaluation.margin_stars if rated else experiment.evaluation.margin
    write_findings(study, out, findings(table, days, margin))


def losses(study: Study, runs: Runs) -> tuple[pd.DataFrame, str]:
    """Returns a row a cell with an absence (mean loss on the same queries, 95% over users), and the judged days."""
    answers = {cell.name: read_answers(run) for cell, run in each_cell(study, runs)}
    lasted = {cell.name: away_days(cell.experiment) for cell in study.cells}
    starts = [cell.experiment.rounds - lasted[cell.name] for cell in study.cells if lasted[cell.name]]
    online = {_rate(cell.experiment): answers[cell.name] for cell in study.cells if not lasted[cell.name]}
    if not starts or not online:
        raise UserError(f"{study.spec.name}: needs cells with a network outage and cells without. Choose with --grid")
    rows = []
    for cell in study.cells:
        rate = _rate(cell.experiment)
        if lasted[cell.name] and rate in online:
            both = paired(online[rate], answers[cell.name])
            found = overall(both[both["round"] >= max(starts)], "apart")
            rows.append((rate, cell.words.get("away", cell.name), lasted[cell.name], *found))
    table = pd.DataFrame(rows, columns=COLUMNS).sort_values(["rate", "days"], ignore_index=True)
    return table, f"days {max(starts)} to {study.cells[0].experiment.rounds - 1}"


def away_days(experiment: Experiment) -> int:
    """Returns the days from the beginning of the (one) outage to the end of the run, when it ends; 0: no outage."""
    if not experiment.network.outages:
        return 0
    spans = [Span.parse(text) for text in experiment.network.outages]
    if len(spans) > 1 or spans[0].end_s < experiment.rounds * DAY_S or not spans[0].everybody:
        raise UserError(
            f"network.outages = {list(experiment.network.outages)}: this study needs one absence of everybody that "
            f"lasts to the end of the run ({experiment.rounds} days)"
        )
    return experiment.rounds - int(spans[0].start_s // DAY_S)


def draw(table: pd.DataFrame) -> Figure:
    """Draws the heat map: a row a rate of change, a column an absence; loss with its interval in each cell."""
    columns = table.sort_values("days")["away"].unique()
    shape = table.pivot(index="rate", columns="away", values="value")[columns]
    most = max(0.01, float(np.nanmax(np.abs(shape.to_numpy()))))
    with style():
        figure, axis = plt.subplots(figsize=(1.6 + 1.15 * len(columns), 0.9 + 0.55 * len(shape)))
        image = axis.imshow(shape, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", origin="lower")
        for row in table.itertuples():
            place = list(columns).index(row.away), list(shape.index).index(row.rate)
            dark = abs(row.value) > 0.6 * most
            text = f"{row.value:+.3f}\n[{row.low:+.3f}, {row.high:+.3f}]"
            axis.text(*place, text, ha="center", va="center", fontsize=7, color="#ffffff" if dark else INK,
                      weight="bold" if row.low > 0 else "normal")  # fmt: skip
        axis.set_xticks(range(len(columns)), [str(name).replace("_", " ") for name in columns])
        axis.set_yticks(range(len(shape)), [f"{rate:.0%}" for rate in shape.index])
        axis.set_xlabel("away for the last … of the run")
        axis.set_ylabel("change a day")
        figure.colorbar(image, ax=axis, label="score lost", fraction=0.05)
        figure.tight_layout()
    return figure


def findings(table: pd.DataFrame, days: str, margin: float) -> list[str]:
    """Returns a sentence a rate: the loss of each absence, and the longest shown to cost less than the margin."""
    sentences = [f"Judged on {days}, on the same queries, against devices that never lost their link."]
    for rate, own in table.groupby("rate"):
        shown = ", ".join(f"{row.away} {row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in own.itertuples())
        hurt, fine = own.loc[own["low"] > 0, "days"], own.loc[own["high"] < margin, "days"]
        loss = f"a loss is shown from {hurt.min()} days on" if len(hurt) else "no absence is shown to cost anything"
        within = f"up to {fine.max()} days cost less than {margin:g}" if len(fine) else (
            f"no absence is shown to cost less than {margin:g}"
        )  # fmt: skip
        sentences.append(f"Users who go {rate:.0%} of the way to another persona a day: {shown}; {loss}; {within}.")
    return sentences


def _rate(experiment: Experiment) -> float:
    return experiment.drift.rate if experiment.drift.kind != "none" else 0.0
