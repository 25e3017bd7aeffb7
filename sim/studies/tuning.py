"""`untether tune`: the study that looks for settings of training on users that are not evaluated, and its analysis.

Every trained arm is given the same values to try and is judged by the same users, so none is tuned more than another.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import tomlkit

from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import SHARED, records
from untether.sim.population.tasks import get_task
from untether.sim.studies.answer import write_findings, write_table
from untether.sim.studies.frames import Runs, summaries
from untether.sim.studies.study import Study

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are tried unless others are given."""

WORST_STARS = 4.0


def validation(experiment: Experiment, users: int) -> dict[str, Any]:
    """Returns the experiment as data, with its trained arms alone, on validation users.

    These are, in the world, those of its split `validation`; of files, the users after all that the experiment
    evaluates or trains its shared adapter on.

    Raises:
        UserError: The experiment trains no arm.
    """
    arms = [arm.name for arm in records(experiment.arms) if arm.trains or arm.name == SHARED]
    if not arms:
        raise UserError(f"arms = {list(experiment.arms)}: none of them is trained, so there is nothing to tune")
    data = tomllib.loads(experiment.to_toml())
    population = data["population"]
    if experiment.population.source == "world":
        population["split"] = "validation"
    else:
        evaluated = experiment.population.users * len(experiment.seeds)
        population["skip_users"] += evaluated + (experiment.population.shared_users if SHARED in arms else 0)
    return {**data, "name": "tune", "arms": arms, "seeds": [experiment.seeds[0]],
            "population": {**population, "users": users}}  # fmt: skip


def write_study(folder: Path, experiment: Experiment, users: int, axes: Mapping[str, Sequence[Any]]) -> Path:
    """Writes the study as `tune.toml` into a folder, to be read (and run again) as any other."""
    study = {
        "name": "tune", "question": "Which settings of training suit this model, on users that are not evaluated?",
        "analysis": "tune", "base": validation(experiment, users), "grid": dict(axes),
    }  # fmt: skip
    for field in axes:
        section, _, name = field.partition(".")
        study["base"].get(section, {}).pop(name, None)
    path = folder / "tune.toml"
    write_atomically(path, tomlkit.dumps(study))
    return path


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes `table.csv` (a row an arm and place on the axes) and `findings.md`, with the settings as TOML."""
    scores = scored(study, summaries(study, runs))
    write_table(out, scores)
    best = scores.loc[scores.groupby("arm", sort=False)["score"].idxmax()]
    spread = scores.groupby("arm")["score"].agg(lambda own: own.max() - own.min())
    sentences = [
        f"{row.arm}: best at {_place(study, row)} (score {row.score:.3f}; from the worst place to the best "
        f"{spread[row.arm]:.3f})."
        for row in best.itertuples()
    ]  # fmt: skip
    together = scores.groupby(list(study.axes), sort=False)["score"].mean()
    values = dict(zip(study.axes, together.idxmax() if len(study.axes) > 1 else [together.idxmax()], strict=True))
    common = ", ".join(f"`{axis} = {value}`" for axis, value in values.items())
    users = int(scores["n_users"].max())
    sentences.append(f"Over all arms alike: {common} (mean score {together.max():.3f}, {users} users a task).")
    notes = [
        "The score is the mean over tasks of the primary metric; an error of stars counts as 1 - error / 4. What suits "
        "each arm on its own goes into `[by_arm.ARM.training]`, what suits all into `[training]`."
    ]
    write_findings(study, out, sentences, notes)


def scored(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Returns a row an arm and cell: the score over tasks, and each task's primary metric."""
    found = rows[rows["reference"].isna()]
    found = found[[get_task(row.task).primary == row.metric for row in found.itertuples()]].copy()
    rating = pd.Series([get_task(task).kind == "rating" for task in found["task"]], index=found.index)
    found["score"] = found["mean"].astype(float).where(~rating, 1 - found["mean"] / WORST_STARS)
    keys = ["arm", *study.axes]
    wide = found.pivot_table(index=keys, columns="task", values="mean", sort=False)
    together = found.groupby(keys, sort=False).agg(score=("score", "mean"), n_users=("n_users", "max"))
    return together.join(wide).reset_index()


def _place(study: Study, row: Any) -> str:
    return ", ".join(f"{axis} = {value}" for axis, value in zip(study.axes, _values(study, row), strict=True))


def _values(study: Study, row: Any) -> list[Any]:
    return [row[2 + number] for number in range(len(study.axes))]  # after the index and the arm
