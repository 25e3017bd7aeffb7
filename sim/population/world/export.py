"""Writes users of the world as ordinary LaMP files and, unlike any real data set, with their ground truth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, User
from untether.sim.experiment.virtual_sections import Drift
from untether.sim.population.tasks import get_task
from untether.sim.population.world import NOW_S, WORLD_TASKS, World, world_task
from untether.sim.population.world.truth import changed_on

SCHEMA_VERSION = "1"


def write_lamp(
    out: Path,
    users: int = 200,
    seed: int = 0,
    *,
    tasks: Sequence[str] = WORLD_TASKS,
    split: str = "evaluation",
    history: tuple[int, int] = (4, 8),
    queries: int = 1,
    rounds: int = 0,
    arrivals: float = 0.0,
    drift: Drift = Drift(),  # noqa: B008 (frozen)
) -> Path:
    """Writes `out/<task>/dev_questions.json` and `dev_outputs.json`, and `out/truth.parquet`. Returns `out`.

    Questions have `user_id` and `date`, profile items `id` and `date` (UTC). The truth has a row a user and task:
    archetype, target and progress of the drift at the end of the history, and the persona's traits as JSON. With
    `rounds`, users live on for so many days (see `World.user`), and `changed_on` is the first day on which a query
    meets a changed persona, null where none does.

    Args:
        out: The folder.
        users: How many.
        seed: Of the world.
        tasks, split, history, queries, rounds, arrivals: As in `World.user`.
        drift: How users change.

    Raises:
        UserError: `users` or `queries` is not positive, or a task or split is unknown.
    """
    out = Path(out)
    if users < 1 or queries < 1:
        raise UserError(f"users = {users}, queries = {queries}: both must be at least 1")
    world = World(seed, drift)
    truth = []
    for name in tasks:
        world_task(name)
        questions, golds = [], []
        for index in range(users):
            user = world.user(index, split, (name,), history, queries, rounds=rounds, arrivals=arrivals)
            truth.append(_truth(world, user, name, split, rounds))
            for question, gold in _questions(user, name):
                questions.append(question)
                golds.append(gold)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "dev_questions.json", questions)
        _write(folder / "dev_outputs.json", {"task": name, "golds": golds})
    table = pa.Table.from_pylist(truth)
    pq.write_table(table.replace_schema_metadata({"schema_version": SCHEMA_VERSION}), out / "truth.parquet")
    return out


def _questions(user: User, name: str) -> Iterable[tuple[dict, dict]]:
    task, items = get_task(name), user.of_task(name)
    for query in user.queries:
        profile = [_profile(item, task.fields) for item in items if item.time_s < query.time_s]
        question = {"id": query.query_id, "user_id": user.user_id, "date": _date(query.time_s)}
        yield (
            question | {"input": task.prompt(query.input), "profile": profile},
            {"id": query.query_id, "output": query.gold},
        )


def _profile(item: Interaction, fields: tuple[str, str]) -> dict[str, str]:
    """A profile item in the task's own fields; a post goes back together."""
    content = {fields[0]: item.input, fields[1]: item.output}
    if fields[0] == fields[1]:
        content = {fields[0]: f"{item.input} {item.output}"}
    return {"id": item.item_id, **content, "date": _date(item.time_s)}


def _truth(world: World, user: User, name: str, split: str, rounds: int) -> dict:
    persona, traits = world.persona(user.user_id, name, NOW_S), world_task(name).traits
    likes = {trait[0]: v for trait, v in zip(traits.choices, persona.taste.choices, strict=True)}
    weights = {trait[0]: w for trait, w in zip(traits.weights, persona.taste.weights, strict=True)}
    return {
        "seed": world.seed,
        "user_id": user.user_id,
        "task": name,
        "split": split,
        "archetype": persona.archetype,
        "target": persona.target,
        "progress": persona.progress,
        "drift": world.drift.kind,
        "changed_on": changed_on(world, user.user_id, name, rounds),
        "traits": json.dumps(likes | weights),
    }


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
