"""A task that an experiment declares in its table `[task]`: known by its name like the built-in ones."""

from __future__ import annotations

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import TASKS
from untether.sim.experiment.sections import TaskSection
from untether.sim.population.tasks import Task

_KINDS = {"text": "generation", "label": "classification", "rating": "rating"}
_METRICS = {
    "generation": ("rouge1", "rougeL"), "classification": ("accuracy", "macro_f1"), "rating": ("mae", "rmse"),
}  # fmt: skip


def declare(section: TaskSection) -> None:
    """Makes the task known. Raises UserError where another task has its name."""
    task = task_of(section)
    if section.name not in TASKS:
        TASKS.register(section.name, task)
    elif TASKS.get(section.name) != task:
        raise UserError(f'task.name = "{section.name}": another task has that name. Give it a name of its own')


def task_of(section: TaskSection) -> Task:
    """Returns the task that a section describes."""
    kind = _KINDS[section.kind]
    labels = tuple(section.labels) or (tuple("12345") if kind == "rating" else None)
    metrics = _METRICS[kind]
    if section.metric:
        metrics = (section.metric, *(metric for metric in metrics if metric != section.metric))
    return Task(
        section.name, section.title or section.name, kind, metrics, metrics[0], section.max_new_tokens,
        {"query": section.instruction}, ("input", "output"), '"{output}" is the answer to "{input}"', labels=labels,
    )  # fmt: skip
