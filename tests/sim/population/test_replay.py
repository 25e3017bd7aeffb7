"""Histories that move through rounds: what is known when, what is asked when, and that no order is ever broken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.population.lamp_files import HEADLINE, reasons, write
from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction, Query, User
from untether.sim.experiment import Experiment
from untether.sim.population.dates import first_day, last_day, parse_date, strictly_earlier
from untether.sim.population.lamp import read_lamp
from untether.sim.population.order import Collected, asked, known_history, one_shot_history
from untether.sim.population.replay import Outlook, Replay, assemble_replayed
from untether.sim.population.source import open_population


def item(name: str, round: int, task: str = "LaMP_4") -> Interaction:
    return Interaction(name, task, f"text {name}", f"title {name}", round * DAY_S, round=round)


def query(name: str, round: int | None, task: str = "LaMP_4") -> Query:
    return Query(name, task, f"article {name}", f"headline {name}", 9 * DAY_S, visible=2, round=round)


def test_a_replayed_user_knows_what_has_come_and_is_asked_what_belongs_to_the_round():
    user = User("ann", (item("a", 0), item("b", 0), item("c", 1), item("d", 3)), (query("p", 0), query("q", 2)))
    known = ["".join(i.item_id for i in known_history(user, "LaMP_4", round)) for round in range(4)]
    assert known == ["ab", "abc", "abc", "abcd"]
    assert [i.item_id for i in known_history(user, "LaMP_4", 3, most=2)] == ["c", "d"]
    assert [[q.query_id for q in asked(user, round)] for round in range(3)] == [["p"], [], ["q"]]


def test_without_replay_every_round_is_like_the_first():
    user = User("ann", (item("a", 0), item("b", 0), item("c", 0)), (query("p", None), query("q", None)))
    for round in range(3):
        assert asked(user, round) == user.queries
        assert known_history(user, "LaMP_4", round) == one_shot_history(user, "LaMP_4") == user.history[:2]
        assert known_history(user, "LaMP_4", round, most=1) == user.history[1:2]


def told(name: str, date: str, text: str = "") -> dict:
    return {"id": name, "title": f"title {name}", "text": text or f"text {name}", "date": date}


def put(name: str, date: str | None, profile: list[dict], text: str = "", before: str = HEADLINE) -> dict:
    dated = {"date": date} if date else {}
    return {"id": name, "user_id": "ann", "input": before + (text or f"article {name}"), "profile": profile} | dated


def rounds_of(user: User) -> tuple[dict[str, int], dict[str, int | None]]:
    return {i.item_id: i.round for i in user.history}, {q.query_id: q.round for q in user.queries}


def test_dates_of_mixed_precision_are_placed_as_worked_by_hand(tmp_path):
    """Round 0 begins on 4 January 2020, the day after the second item; a round is ten days, there are six."""
    profile = [
        told("a", "2019"), told("b", "2020-01-03"), told("c", "2020-01-04"), told("d", "2020-01-13"),
        told("e", "2020-01-14"), told("again", "2020-01-20", "Text C!"), told("f", "2020-01"),
        told("g", "2020-02"), told("h", "2020-02-10"),
    ]  # fmt: skip
    asked_of_ann = [
        put("early", "2020-01-02", profile[:1]), put("same", "2020-01-14", profile[:4], "text e."),
        put("late", "2020-03-20", profile), put("sometime", None, profile),
    ]  # fmt: skip
    folder = write(tmp_path / "LaMP_4", asked_of_ann)
    [user], exclusions = read_lamp(folder, min_history=2, replay=Replay(6, 10.0))
    items, queries = rounds_of(user)
    # February is asked as a whole on its last day (round 5): its tenth day must wait until then, which is too late.
    assert queries == {"ask-c": 0, "ask-d": 0, "same": 1, "ask-h": 3, "ask-g": 5}
    assert items == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "again": 2, "f": 3}
    assert {q.query_id: q.gold for q in user.queries}["same"] == "G of same"
    assert reasons(exclusions) == {
        "question from before the first round": 1, "query after the last round": 1, "undated question": 1,
        "history item after the last round": 2,
    }  # fmt: skip


def test_of_a_year_nothing_is_known_before_all_of_it_is_asked(tmp_path):
    papers = [
        {"id": f"p{place}", "title": f"title {place}", "abstract": f"abstract {place}", "date": year}
        for place, year in enumerate(("2010", "2010", "2012", "2012", "2013"))
    ]
    folder = write(tmp_path / "LaMP_5", [{"id": "q", "input": "abstract q", "profile": papers}])
    [user], _ = read_lamp(folder, min_history=2, replay=Replay(5, 365.0))
    items, queries = rounds_of(user)  # 31 December of 2011, 2012 and 2013 are days 364, 730 and 1095
    assert queries == {"ask-p2": 2, "ask-p3": 2, "ask-p4": 3}
    assert items == {"p0": 0, "p1": 0, "p2": 3, "p3": 3, "p4": 4}


def test_at_most_so_many_queries_and_only_labels_are_asked(tmp_path):
    news = [
        {"id": f"n{day}", "text": f"text {day}", "title": "t", "category": category, "date": f"2020-01-0{day}"}
        for day, category in ((1, "sports"), (2, "sports"), (3, "golf"), (4, "crime"), (5, "sports"), (6, "crime"))
    ]
    folder = write(tmp_path / "LaMP_2N", [put("q", "2020-01-09", news, before="")], {"q": "crime"})
    [user], exclusions = read_lamp(folder, min_history=1, queries=2, replay=Replay(30, 1.0))
    assert rounds_of(user)[1] == {"ask-n2": 0, "ask-n4": 2}
    assert rounds_of(user)[0] == {f"n{day}": day - 1 for day in range(1, 7)}
    assert reasons(exclusions) == {"gold is no label of the task": 1, "more queries than population.queries": 3}


def test_all_tasks_of_a_user_begin_together(tmp_path):
    news = [
        {"id": f"n{day}", "text": f"news {day}", "title": "t", "category": "crime", "date": f"2020-01-{day:02}"}
        for day in (5, 6, 9)
    ]
    write(tmp_path / "LaMP_4", [put("q", "2020-01-12", [told(f"i{day}", f"2020-01-{day:02}") for day in (1, 2, 3, 8)])])
    write(tmp_path / "LaMP_2N", [put("k", "2020-01-30", news, before="")], {"k": "crime"})
    [user], exclusions = read_lamp(tmp_path, min_history=2, replay=Replay(9, 1.0))
    assert rounds_of(user)[1] == {"ask-n9": 2, "ask-i8": 1, "q": 5}
    assert reasons(exclusions) == {"query after the last round": 1}
    [user], exclusions = read_lamp(tmp_path, min_history=3, replay=Replay(9, 1.0))  # the news would begin on the tenth
    assert user.tasks == ("LaMP_4",)
    assert reasons(exclusions)["no later query in the rounds"] == 1


def test_files_without_dates_cannot_be_replayed(tmp_path):
    undated = [{"id": str(i), "title": "t", "text": f"text {i}"} for i in range(4)]
    folder = write(tmp_path / "LaMP_4", [put("q", None, undated)])
    with pytest.raises(UserError, match=r"dev_questions.json: population.replay = true, .* replay needs dates"):
        read_lamp(folder, replay=Replay(5, 10.0))
    dated = [told(str(i), f"201{i}-05-01") for i in range(4)]
    folder = write(tmp_path / "LaMP_4", [put("q", None, dated)])
    with pytest.raises(UserError, match=r"no user has 3 items .* later query within 2 rounds of 30 days"):
        read_lamp(folder, replay=Replay(2, 30.0))
    assert len(read_lamp(folder, replay=Replay(13, 30.0))[0]) == 1


def test_an_experiment_replays_files(tmp_path):
    profile = [told(f"i{day}", f"2020-01-{day:02}") for day in range(1, 9)]
    folder = write(tmp_path / "LaMP_4", [put("q", "2020-01-12", profile)])
    population = {"source": "lamp", "path": str(folder), "users": 1, "replay": True, "round_days": 2.0, "queries": 20}
    experiment = Experiment.model_validate({"rounds": 3, "population": population})
    opened = open_population(experiment, 1)
    assert opened.order == "time"
    assert [len(asked(opened.user(0), round)) for round in range(3)] == [2, 2, 1]
    assert opened.exclusions() == {"query after the last round": 1, "history item after the last round": 1}


keys = st.one_of(
    st.tuples(st.integers(2018, 2021)),
    st.tuples(st.integers(2018, 2021), st.integers(1, 12)),
    st.tuples(st.integers(2018, 2021), st.integers(1, 12), st.integers(1, 28)),
)
REPLAY = Replay(12, 61.3)
histories = st.lists(st.tuples(keys, st.booleans()), max_size=14)


def collected(task: str, history: list, texts: int) -> tuple[Collected, dict[str, tuple], Outlook]:
    """A task's items (and, where the flag is set, questions of the file) on the given dates."""
    own, dates, outlook = Collected(), {}, Outlook(2, REPLAY)
    for place, (key, is_question) in enumerate(history):
        name, text = f"{task}-{place}", f"text {place % texts}"
        time_s = parse_date("-".join(f"{part:02}" for part in key))
        question = Query(name, task, text, f"gold {place}", time_s) if is_question else None
        item = Interaction(name, task, text, f"gold {place}", time_s)
        dates[name] = dates[f"ask-{name}"] = key
        profile = [] if is_question else [(item, key)]
        asking = (question, key) if question else (Query("undated", task, "x", "y"), ())
        own.add(*asking, profile)
        outlook.see(*asking, profile)
    return own, dates, outlook


@settings(max_examples=150, deadline=None)
@given(histories, histories, st.sampled_from([3, 99]))
def test_no_order_is_ever_broken(first, second, texts):
    parts = {task: collected(task, history, texts) for task, history in (("LaMP_4", first), ("LaMP_5", second))}
    user, _ = assemble_replayed("ann", {task: own for task, (own, _, _) in parts.items()}, 2, 99, REPLAY)
    dates = {name: key for _, found, _ in parts.values() for name, key in found.items()}
    if texts == 99:  # no text is told twice: the first look is exact
        assert bool(user.queries) == any(not outlook.lacks() for _, _, outlook in parts.values())
    for task in user.tasks:
        known: set[str] = set()
        assert len(known_history(user, task, 0)) >= 2
        for round in range(REPLAY.rounds):
            items = {item.item_id for item in known_history(user, task, round)}
            assert known <= items
            known = items
            for query in asked(user, round):  # of any task
                assert all(strictly_earlier(dates[name], dates[query.query_id]) for name in items)
    texts_asked = [(query.task, query.input) for query in user.queries]
    assert len(set(texts_asked)) == len(texts_asked)
    assert sum(len(asked(user, round)) for round in range(REPLAY.rounds)) == len(user.queries)


@given(keys, keys)
def test_a_date_is_all_the_days_that_it_may_mean(one, other):
    assert strictly_earlier(one, other) == (last_day(one) < first_day(other))
    assert last_day((2020, 2)) - first_day((2020, 2)) == 28
    assert last_day((2021,)) - first_day((2021,)) == 364
