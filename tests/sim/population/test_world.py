"""The world: determinism, dates, readable texts, recoverable personas, drift, and what samples reveal."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.experiment.virtual_sections import Drift
from untether.sim.population.tasks import get_task
from untether.sim.population.world import NOW_S, WORLD_TASKS, World, world_task
from untether.sim.population.world.banks import Finder
from untether.sim.population.world.base import Item
from untether.sim.population.world.belief import infer
from untether.sim.population.world.drift import progress
from untether.sim.population.world.export import write_lamp
from untether.sim.population.world.persona import ARCHETYPES, Taste


def test_the_six_tasks_have_their_official_labels():
    assert set(WORLD_TASKS) == {"LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"}
    world = World(3)
    for name in ("LaMP_1", "LaMP_2", "LaMP_3"):
        answers = {q.gold for i in range(40) for q in world.user(i, tasks=(name,)).queries}
        assert answers <= set(get_task(name).labels)
        assert len(answers) >= 2


def test_archetypes_of_the_splits_are_disjoint():
    seen = [set(indices) for indices in ARCHETYPES.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert len(ARCHETYPES["pretraining"]) >= 24


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**5), task=st.sampled_from(WORLD_TASKS))
def test_a_user_follows_from_seed_split_and_index_alone(seed, index, task):
    living = {"rounds": 10, "arrivals": 0.3}
    user = World(seed).user(index, tasks=(task,), **living)
    alone, together = World(seed).user(index, tasks=(task,), **living), World(seed).user(index, **living)
    assert user == alone
    assert user.of_task(task) == together.of_task(task)
    assert 4 + 3 <= len(user.history) <= 8 + 3
    texts = [item.input + item.output for item in user.history] + [query.input for query in user.queries]
    assert len(set(texts)) == len(texts)
    for query in user.queries:
        earlier = [item for item in user.history if item.time_s // DAY_S < query.time_s // DAY_S]
        assert query.visible == len(earlier)
        assert [item.item_id for item in user.history[: query.visible]] == [item.item_id for item in earlier]


def test_histories_without_later_items_are_strictly_earlier_than_every_query():
    user = World(1).user(0)
    assert max(item.time_s for item in user.history) < NOW_S <= min(query.time_s for query in user.queries)
    assert {query.visible for query in user.queries if query.task == "LaMP_4"} == {len(user.of_task("LaMP_4"))}


def test_other_seeds_and_splits_draw_other_users():
    first, second = World(1).user(0), World(2).user(0)
    assert first.user_id != second.user_id
    assert not {q.input for q in first.queries} & {q.input for q in second.queries}
    assert World(1).user(0, "validation").user_id != first.user_id


def test_a_users_cluster_is_the_archetype_that_all_seeds_share():
    users = [World(seed).user(index, tasks=("LaMP_2",), queries=1) for seed in (1, 2) for index in range(40)]
    for user in users:
        assert user.cluster == f"archetype-{World().persona(user.user_id, 'LaMP_4').archetype}"
    assert {user.cluster for user in users[:40]} & {user.cluster for user in users[40:]}


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_every_gold_is_what_the_persona_says_of_the_text_alone(task):
    world, mine = World(5), world_task(task)
    for index in range(15):
        user = world.user(index, tasks=(task,))
        taste = world.persona(user.user_id, task).taste
        for query in user.queries:
            assert mine.answer(mine.read(query.input), taste) == query.gold


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_a_shown_item_never_contradicts_the_habits_of_its_writer(task):
    world, mine = World(6), world_task(task)
    for index in range(15):
        user = world.user(index, tasks=(task,))
        choices = world.persona(user.user_id, task).taste.choices
        for item in user.history:
            evidence = mine.evidence(Item(item.input, item.output, item.form))
            assert evidence is not None
            for dimension, values in evidence.choices:
                assert choices[dimension] in values, (item, mine.traits.choices[dimension])


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_seeing_items_helps_and_knowing_archetypes_helps_more(task):
    world, mine = World(7), world_task(task)
    right = {"nothing seen": 0.0, "none": 0.0, "pretraining": 0.0}
    for index in range(40):
        user = world.user(index, "validation", (task,), history=(6, 6))
        evidence = [mine.evidence(Item(i.input, i.output, i.form)) for i in user.history]
        guesses = {"nothing seen": infer(mine, [], "pretraining")}
        guesses |= {knowledge: infer(mine, evidence, knowledge) for knowledge in ("none", "pretraining")}
        for name, taste in guesses.items():
            answers = [(mine.answer(mine.read(q.input), taste), q.gold) for q in user.queries]
            if task == "LaMP_3":
                right[name] -= sum(abs(int(a) - int(b)) for a, b in answers)
            else:
                right[name] += sum(a == b for a, b in answers)
    assert right["pretraining"] > right["nothing seen"]
    assert right["pretraining"] >= right["none"]


@pytest.mark.parametrize("score", ["", "12", "6", "fine"])
def test_a_review_without_a_score_says_nothing_of_its_writer(score):
    assert world_task("LaMP_3").evidence(Item("I bought this tent for college. It was a real bargain.", score)) is None


def test_a_review_is_scored_as_worked_by_hand():
    reviews = world_task("LaMP_3")
    scene = reviews.read("I bought this tent for college. It was a real bargain. The seller was rude.")
    assert scene.facts == ((0, 1), (6, -1))  # price praised, service blamed
    weights = [0.0] * 9
    weights[0], weights[1], weights[7] = -0.5, 1.6, 0.4
    assert reviews.answer(scene, Taste((), tuple(weights))) == "4"  # 3 - 0.5 + 1.6 - 0.4 = 3.7


def test_a_headline_is_written_as_worked_by_hand():
    news = world_task("LaMP_4")
    text = "Retired nurses opened the old bridge in Oslo on Monday after a narrow vote. Nobody would name the price."
    choices = [0] * len(news.traits.choices)
    index = {name: i for i, (name, _, _) in enumerate(news.traits.choices)}
    choices[index["verb opened"]], choices[index["frame civic"]], choices[index["who"]] = 2, 1, 1
    choices[index["tail"]] = 3
    assert news.answer(news.read(text), Taste(tuple(choices))) == "Oslo: retired nurses inaugurate bridge on Monday"


@pytest.mark.parametrize("task", WORLD_TASKS)
@pytest.mark.parametrize("text", ["", "Quarterly results were mixed.", '"A" [1]: "B" [2]: "C"', "☃ the the the"])
def test_texts_from_elsewhere_are_not_read(task, text):
    assert world_task(task).read(text) is None


def test_finder_prefers_the_longest_phrase_and_keeps_the_order():
    finder = Finder({"red": 1, "red fox": 2, "fox": 3})
    assert finder.find("Red fox, fox; redder. red-fox red") == [2, 3, 1]


@pytest.mark.parametrize(
    ("drift", "days", "phase", "expected"),
    [
        (Drift(kind="none"), 50, 0.0, 0.0),
        (Drift(kind="gradual", day=2, rate=0.1), 7, 0.0, 0.5),
        (Drift(kind="gradual", day=2, rate=0.1, size=0.4), 100, 0.0, 0.4),
        (Drift(kind="gradual", day=0, rate=0.1, jitter_days=10), 7, 0.5, 0.2),
        (Drift(kind="abrupt", day=5), 4.9, 0.0, 0.0),
        (Drift(kind="abrupt", day=5, size=0.7), 5, 0.0, 0.7),
        (Drift(kind="recurring", day=0, period=10), 4, 0.0, 1.0),
        (Drift(kind="recurring", day=0, period=10), 6, 0.0, 0.0),
        (Drift(kind="recurring", day=0, period=10), 12, 0.0, 1.0),
    ],
)
def test_drift_progress(drift, days, phase, expected):
    assert progress(drift, days, phase) == pytest.approx(expected)


def test_drift_changes_some_users_after_its_day_and_never_the_past():
    still, moving = World(4), World(4, Drift(kind="abrupt", day=10, share=0.5, jitter_days=0))
    changed = 0
    for index in range(60):
        before, after = still.user(index, tasks=("LaMP_2",)), moving.user(index, tasks=("LaMP_2",))
        assert before.history == after.history
        pairs = list(zip(before.queries, after.queries, strict=True))
        assert all(a == b for a, b in pairs if a.time_s < NOW_S + 10 * DAY_S)
        late = moving.persona(after.user_id, "LaMP_2", NOW_S + 20 * DAY_S)
        assert late.progress in (0.0, 1.0)
        assert (late.progress == 0) == (before.queries == after.queries) or late.archetype == late.target
        changed += late.progress > 0
    assert 18 <= changed <= 42


def test_mistakes_are_named():
    with pytest.raises(UserError, match="LaMP_9"):
        World(0).user(0, tasks=("LaMP_9",))
    with pytest.raises(UserError, match="holdout"):
        World(0).user(0, split="holdout")
    with pytest.raises(UserError, match="somebody"):
        World(0).persona("somebody", "LaMP_2")
    with pytest.raises(ValueError, match="weekly"):
        Drift(kind="weekly")


def test_lamp_files_give_the_same_users_back(tmp_path):
    write_lamp(tmp_path, users=5, seed=2, queries=2)
    world = World(2)
    for name in WORLD_TASKS:
        questions = json.loads((tmp_path / name / "dev_questions.json").read_text())
        golds = {g["id"]: g["output"] for g in json.loads((tmp_path / name / "dev_outputs.json").read_text())["golds"]}
        task = get_task(name)
        assert len(questions) == 10
        for question in questions:
            user = world.user(int(question["user_id"][-5:]), tasks=(name,), queries=2)
            query = next(q for q in user.queries if q.query_id == question["id"])
            assert (task.content(question["input"]), golds[question["id"]]) == (query.input, query.gold)
            items = [pair for raw in question["profile"] for pair in task.interactions(raw)]
            assert tuple(items) == user.history
    table = pq.read_table(tmp_path / "truth.parquet")
    assert table.num_rows == 5 * len(WORLD_TASKS)
    assert b"schema_version" in table.schema.metadata
    assert np.all(np.isin(table["archetype"].to_numpy(), ARCHETYPES["evaluation"]))
