"""A date that is a year or a month stands for all its days: nothing that may be as late as a query is known to it."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from untether.sim.core.clock import DAY_S
from untether.sim.core.records import Query, User
from untether.sim.population.dates import calendar_key, date_span, parse_date, strictly_earlier
from untether.sim.population.order import Collected, assemble, known_history, latest_s, one_shot_history, over_before
from untether.sim.population.others import NOT_OLDER, SCORED, shared_items
from untether.sim.population.replay import Replay, assemble_replayed
from untether.sim.population.tasks import get_task

years, months, days, hours = (st.integers(*span) for span in ((2018, 2020), (1, 12), (1, 28), (0, 23)))
dates = st.one_of(
    years.map(str),
    st.builds("{}-{:02}".format, years, months),
    st.builds("{}-{:02}-{:02}".format, years, months, days),
    st.builds("{}-{:02}-{:02}T{:02}:30:00".format, years, months, days, hours),
)
FIELDS = {"LaMP_4": ("text", "title"), "LaMP_5": ("abstract", "title")}


def collected(task: str, items: list[str], asked: list[str]) -> tuple[Collected, dict[str, tuple]]:
    """As a file of the task is read: items and questions on these dates, and each one's calendar key by its name."""
    own, keys, profile = Collected(), {}, []
    for place, date in enumerate(items):
        name = f"{task}-i{place}"
        source, target = FIELDS[task]
        told = {"id": name, source: f"text of {name}", target: f"title of {name}", "date": date}
        [item] = get_task(task).interactions(told)
        keys[name] = calendar_key(date)
        profile.append((item, keys[name]))
    for place, date in enumerate(asked):
        name = f"{task}-q{place}"
        keys[name] = calendar_key(date)
        own.add(Query(name, task, f"text of {name}", f"gold of {name}", parse_date(date)), keys[name], profile)
    return own, keys


def users(history: dict[str, tuple[list[str], list[str]]], **replay) -> tuple[User, dict[str, tuple]]:
    parts = {task: collected(task, *dated) for task, dated in history.items()}
    own = {task: part for task, (part, _) in parts.items() if part.queries}
    make = assemble_replayed if replay else assemble
    user, _ = make("ann", own, 1, 99, *replay.values())
    return user, {name: key for _, keys in parts.values() for name, key in keys.items()}


some = st.fixed_dictionaries({
    task: st.tuples(st.lists(dates, max_size=8), st.lists(dates, max_size=3)) for task in FIELDS
})  # fmt: skip


@settings(max_examples=150)
@given(some)
def test_a_one_shot_run_knows_all_that_is_surely_earlier_and_nothing_else(history):
    user, keys = users(history)
    asked = [query.query_id for query in user.queries]
    for task in user.tasks:
        known = {item.item_id for item in one_shot_history(user, task)}
        sure = {
            name for name in keys
            if name.startswith(f"{task}-i") and all(strictly_earlier(keys[name], keys[query]) for query in asked)
        }  # fmt: skip
        assert known == sure
        for query in (query for query in user.queries if query.task == task):
            seen, key = {item.item_id for item in user.of_task(task)[: query.visible]}, keys[query.query_id]
            assert seen == {n for n in keys if n.startswith(f"{task}-i") and strictly_earlier(keys[n], key)}


@settings(max_examples=100)
@given(some)
def test_a_replayed_user_never_knows_what_may_be_as_late_as_a_query_of_any_task(history):
    user, keys = users(history, replay=Replay(12, 91.3))
    for task in user.tasks:
        for query in user.queries:
            known, key = known_history(user, task, query.round), keys[query.query_id.removeprefix("ask-")]
            assert all(strictly_earlier(keys[item.item_id], key) for item in known)


@settings(max_examples=100)
@given(some, st.lists(dates, min_size=1, max_size=3))
def test_others_items_are_surely_older_than_every_query(history, asked):
    user, keys = users(history)
    queries = [Query(f"q{n}", "LaMP_4", f"asked {n}", f"answer {n}", parse_date(date)) for n, date in enumerate(asked)]
    population = SimpleNamespace(
        shared_users=lambda: [user], first_query_s=lambda: min(query.time_s for query in queries),
        scored=lambda task: iter(queries),
    )  # fmt: skip
    for task in user.tasks:
        known = {item.item_id for item in one_shot_history(user, task)}
        left, counts = shared_items(population, task)
        assert {item.item_id for item in left} == {
            name for name in known if all(strictly_earlier(keys[name], calendar_key(date)) for date in asked)
        }
        assert counts[NOT_OLDER] == len(known) - len(left) and counts[SCORED] == 0


def test_a_year_of_one_task_waits_for_the_query_of_another():
    """"2018" may be December: no query of June 2018 may see it, whichever task asks; a query of 2019 may."""
    papers = (["2017", "2018", "2018-05", "2018-06"], ["2019-03-01"])
    news = (["2018-05-31", "2018-06-01"], ["2018-06-02"])
    user, _ = users({"LaMP_5": papers, "LaMP_4": news})
    assert [item.item_id for item in one_shot_history(user, "LaMP_5")] == ["LaMP_5-i0", "LaMP_5-i2"]
    assert [item.item_id for item in one_shot_history(user, "LaMP_4")] == ["LaMP_4-i0", "LaMP_4-i1"]
    alone, _ = users({"LaMP_5": papers})
    assert len(one_shot_history(alone, "LaMP_5")) == 4


@given(dates, dates)
def test_spans_say_what_calendar_keys_say(date, other):
    time_s, until_s = date_span(date)
    assert time_s == parse_date(date) and (until_s is None) == (len(calendar_key(date)) == 3)
    [item] = get_task("LaMP_4").interactions({"id": "1", "text": "a", "title": "b", "date": date})
    assert over_before(item, parse_date(other)) == strictly_earlier(calendar_key(date), calendar_key(other))
    assert latest_s([item]) == (time_s if until_s is None else until_s - DAY_S)


def test_undated_items_are_before_nothing():
    [item] = get_task("LaMP_4").interactions({"id": "1", "text": "a", "title": "b"})
    assert not over_before(item, 1e12) and latest_s([item]) is None
    assert date_span(None) == date_span("") == (None, None)
