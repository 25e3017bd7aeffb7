"""Users of the world who live on for rounds: what comes when, what stays as it was, and what is true of a change."""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.virtual_sections import Drift
from untether.sim.population.order import asked, known_history
from untether.sim.population.source import open_population
from untether.sim.population.world import NOW_S, WORLD_TASKS, World, world_task
from untether.sim.population.world.export import write_lamp
from untether.sim.population.world.truth import answers, changed_on, query_time_s, truth_rows
from untether.sim.run.directory import RunDirectory

DRIFTS = [Drift(kind=kind, day=3, rate=0.1, period=8, jitter_days=4) for kind in ("gradual", "abrupt", "recurring")]
lives = st.tuples(
    st.integers(0, 10**6), st.sampled_from(WORLD_TASKS), st.integers(1, 12), st.sampled_from([0, 0.2, 0.5, 1, 2.5]),
    st.integers(1, 15),
)  # fmt: skip


def lived(world: World, task: str, rounds: int, arrivals: float, queries: int):
    return world.user(3, tasks=(task,), queries=queries, rounds=rounds, arrivals=arrivals)


@settings(max_examples=40, deadline=None)
@given(lives)
def test_whatever_is_known_is_of_a_day_before_whatever_is_asked(life):
    seed, task, rounds, arrivals, queries = life
    user = lived(World(seed), task, rounds, arrivals, queries)
    known: set[str] = set()
    for round in range(rounds):
        items = known_history(user, task, round)
        assert known <= {item.item_id for item in items}
        known = {item.item_id for item in items}
        for query in asked(user, round):
            assert round == (query.time_s - NOW_S) // DAY_S
            assert all(item.time_s // DAY_S < query.time_s // DAY_S for item in items)
            assert len(items) == query.visible  # and nothing of an earlier day is missing
    assert sum(len(asked(user, round)) for round in range(rounds)) == queries


@settings(max_examples=40, deadline=None)
@given(lives)
def test_queries_and_arrivals_are_spread_evenly(life):
    seed, task, rounds, arrivals, queries = life
    user = lived(World(seed), task, rounds, arrivals, queries)
    per_round = [len(asked(user, round)) for round in range(rounds)]
    assert max(per_round) - min(per_round) <= 1
    came = Counter(item.round for item in user.history if item.round)
    assert abs(sum(came.values()) - arrivals * rounds) < 1
    assert all(count in (int(arrivals), int(arrivals) + 1) for count in came.values())


def test_users_do_not_all_ask_and_write_on_the_same_days():
    users = [World(1).user(i, tasks=("LaMP_4",), queries=2, rounds=8, arrivals=0.25) for i in range(30)]
    assert len({query.round for user in users for query in user.queries}) == 8
    assert len({item.round for user in users for item in user.history if item.round}) == 8


@settings(max_examples=25, deadline=None)
@given(lives, st.integers(2, 4), st.sampled_from([Drift(), *DRIFTS]))
def test_more_rounds_change_nothing_of_the_earlier_ones(life, times, drift):
    seed, task, rounds, arrivals, queries = life
    short = lived(World(seed, drift), task, rounds, arrivals, queries)
    long = lived(World(seed, drift), task, rounds * times, arrivals, queries * times)
    assert [item for item in long.history if item.round <= rounds] == list(short.history)
    assert [query for query in long.queries if query.round < rounds] == list(short.queries)


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("task", WORLD_TASKS)
def test_nobody_is_another_before_the_change(task, drift):
    still, moving = World(8), World(8, drift)
    for index in range(8):
        options = {"tasks": (task,), "queries": 12, "rounds": 12, "arrivals": 1}
        before, after = still.user(index, **options), moving.user(index, **options)
        first = changed_on(moving, after.user_id, task, 12)
        assert first is not None and 3 <= first <= 7
        early = NOW_S + first * DAY_S
        assert [i for i in before.history if i.time_s < early] == [i for i in after.history if i.time_s < early]
        assert [q for q in before.queries if q.time_s < early] == [q for q in after.queries if q.time_s < early]
        assert [i.time_s for i in before.history] == [i.time_s for i in after.history]
        texts = [item.input for item in after.history if item.form == "query"] + [q.input for q in after.queries]
        assert len(set(texts)) == len(texts)


def test_an_abrupt_change_shows_on_its_day_and_not_before():
    world = World(3, Drift(kind="abrupt", day=5, jitter_days=0))
    shown = 0
    for index in range(20):
        user = world.user(index, tasks=("LaMP_4",), queries=10, rounds=10)
        assert changed_on(world, user.user_id, "LaMP_4", 10) == 5
        assert changed_on(world, user.user_id, "LaMP_4", 5) is None
        for query in user.queries:
            said = answers(world, user.user_id, "LaMP_4", query.input, query.time_s)
            assert said.now == query.gold
            assert query.round >= 5 or said.before == query.gold
            shown += said.before != query.gold
    assert shown > 40


def test_a_recurring_change_returns_and_a_gradual_one_never_does():
    user = World(3).user_id(0)
    swinging = World(3, Drift(kind="recurring", day=2, period=6, jitter_days=0))
    path = [swinging.progress(user, "LaMP_4", query_time_s(round)) for round in range(12)]
    assert path == [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0]
    moving = World(3, Drift(kind="gradual", day=2, rate=0.1, size=0.8))
    path = [moving.progress(user, "LaMP_4", query_time_s(round)) for round in range(30)]
    assert path == sorted(path) and path[1] == 0 and path[-1] == 0.8 and len(set(path)) > 5
    choices = [moving.persona(user, "LaMP_4", query_time_s(round)).taste.choices for round in range(30)]
    for before, after in zip(choices, choices[1:], strict=False):  # a habit that has changed stays changed
        assert all(b in (a, last) for a, b, last in zip(before, after, choices[-1], strict=True))


def test_the_old_persona_is_the_one_before_any_change():
    world = World(3, Drift(kind="abrupt", day=0, jitter_days=0))
    user = world.user(0, tasks=("LaMP_3",), queries=10, rounds=10)
    still = World(3)
    teller = world_task("LaMP_3")
    for query in user.queries:
        said = answers(world, user.user_id, "LaMP_3", query.input, query.time_s)
        old = still.persona(user.user_id, "LaMP_3").taste
        assert said == (teller.answer(teller.read(query.input), old), query.gold)
    assert answers(world, user.user_id, "LaMP_3", "Quarterly results were mixed.", NOW_S) is None


def test_the_truth_has_a_row_a_round_device_and_task(tmp_path):
    world = World(3, Drift(kind="abrupt", day=2, share=0.5, jitter_days=0))
    users = {f"d0000{i}": world.user_id(i) for i in range(8)}
    run = RunDirectory(tmp_path)
    run.write_truth(truth_rows(world, users, ("LaMP_4", "LaMP_3"), 4))
    table = pq.read_table(tmp_path / "truth.parquet")
    assert b"schema_version" in table.schema.metadata
    rows = table.to_pylist()
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert len({(r["round"], r["device_id"], r["task"]) for r in rows}) == len(rows) == 4 * 8 * 2
    changed = {row["user_id"] for row in rows if row["changed_on_round"] is not None}
    assert 0 < len(changed) < 8
    for row in rows:
        is_after = row["user_id"] in changed and row["round"] >= 2
        assert (row["seed"], row["progress"]) == (3, float(is_after))
        assert row["changed_on_round"] in (2, None)


def test_an_experiment_says_how_its_users_live():
    population = {"users": 2, "tasks": ["LaMP_4"], "queries": 6, "replay": True, "arrivals": 1.0}
    drift = {"kind": "abrupt", "day": 2.0, "jitter_days": 0.0}
    experiment = Experiment.model_validate({"rounds": 6, "population": population, "drift": drift})
    opened = open_population(experiment, 1)
    assert opened.user(1) == World(1, experiment.drift).user(1, tasks=("LaMP_4",), queries=6, rounds=6, arrivals=1.0)
    assert [len(asked(opened.user(0), round)) for round in range(6)] == [1] * 6
    assert [row["changed_on_round"] for rows in opened.truth() for row in rows] == [2] * 12
    still = Experiment.model_validate({"population": {"users": 2, "tasks": ["LaMP_4"]}})
    assert open_population(still, 1).user(0) == World(1).user(0, tasks=("LaMP_4",))


@pytest.mark.parametrize(
    ("population", "rule"),
    [({}, "population.replay = true"), ({"source": "lamp", "path": "x", "replay": True}, "change by themselves")],
)
def test_a_change_that_would_change_nothing_is_refused(population, rule):
    with pytest.raises(UserError, match=rule):
        Experiment.build({"population": population, "drift": {"kind": "gradual"}}, None, "here")


def test_files_of_a_changing_world_tell_when_it_changed(tmp_path):
    drift = Drift(kind="abrupt", day=2, share=0.5, jitter_days=0)
    write_lamp(tmp_path, users=12, seed=2, tasks=("LaMP_4",), queries=4, rounds=4, arrivals=1.0, drift=drift)
    rows = pq.read_table(tmp_path / "truth.parquet").to_pylist()
    assert {row["changed_on"] for row in rows} == {2, None}
    assert {row["drift"] for row in rows} == {"abrupt"}


@given(st.integers(0, 50), st.integers(1, 70), st.integers(0, 40), st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_what_is_asked_when_is_known_without_writing_it(index, queries, rounds, arrivals):
    world, tasks = World(3), ("LaMP_3", "LaMP_2")
    user = world.user(index, "evaluation", tasks, (3, 5), queries, rounds=rounds, arrivals=arrivals)
    asked = world.asked(index, "evaluation", tasks, queries, rounds=rounds, arrivals=arrivals)
    assert asked == [(query.task, query.round) for query in user.queries]
