"""Real histories come in whole, in order, and with everything that was left out accounted for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sim.population.lamp_files import article, question, reasons, write
from untether.sim.core.errors import UserError
from untether.sim.population.dates import calendar_key, strictly_earlier
from untether.sim.population.lamp import one_shot_history, order_of, read_lamp


def test_growing_profiles_are_united_and_each_query_sees_strictly_earlier_days(tmp_path):
    early = [article(day) for day in (1, 2, 3, 4)]
    later = [*early, {"id": "i4b", "title": "G of q1", "text": "article q1", "date": "2020-01-04"}, article(6)]
    folder = write(tmp_path / "LaMP_4", [question("q2", 7, later), question("q1", 4, early)])
    [user], exclusions = read_lamp(folder)
    assert exclusions == []
    assert [item.item_id for item in user.history] == ["i1", "i2", "i3", "i4", "i4b", "i6"]
    assert [(query.query_id, query.visible) for query in user.queries] == [("q1", 3), ("q2", 6)]
    assert (user.queries[0].input, user.queries[0].gold) == ("article q1", "G of q1")
    assert [item.item_id for item in one_shot_history(user, "LaMP_4")] == ["i1", "i2", "i3"]
    assert [item.item_id for item in one_shot_history(user, "LaMP_4", most=2)] == ["i2", "i3"]
    assert order_of(user) == "time"


def test_years_and_instants_are_compared_at_the_coarser_of_both():
    assert strictly_earlier(calendar_key("2019"), calendar_key("2020"))
    assert not strictly_earlier(calendar_key("2020"), calendar_key("2020-05-01"))
    assert not strictly_earlier(calendar_key("2020-05-01T08:00:00"), calendar_key("2020-05-01T22:00:00"))
    assert strictly_earlier(calendar_key("2020-04-30T23:59:59"), calendar_key("2020-05-01"))
    assert not strictly_earlier((), calendar_key("2020"))


@given(st.lists(st.integers(1, 28), min_size=1, max_size=12), st.lists(st.integers(1, 28), min_size=1, max_size=4))
def test_no_query_ever_sees_its_own_day_or_later(tmp_path_factory, items, asked):
    profile = [article(day, id=f"i{place}", text=f"text {place}") for place, day in enumerate(items)]
    questions = [question(f"q{place}", day, profile) for place, day in enumerate(asked)]
    folder = write(tmp_path_factory.mktemp("lamp") / "LaMP_4", questions)
    try:
        [user], _ = read_lamp(folder, min_history=1)
    except UserError:
        assert not any(day < min(asked) for day in items)
        return
    for query in user.queries:
        seen = user.of_task("LaMP_4")[: query.visible]
        assert all(item.time_s < query.time_s for item in seen)
        assert len(seen) == sum(day < asked[int(query.query_id[1:])] for day in items)
    assert len(user.history) == len(items)
    assert all(item.time_s < min(q.time_s for q in user.queries) for item in one_shot_history(user, "LaMP_4"))


def test_another_tasks_query_bounds_the_one_shot_history_too(tmp_path):
    news = {"id": "c", "title": "t", "text": "x", "category": "sports", "date": "2020-01-01"}
    asked = {"id": "k", "user_id": "ann", "date": "2020-01-03", "input": "text 4", "profile": [news]}
    write(tmp_path / "LaMP_4", [question("q", 9, [article(day) for day in (1, 2, 4, 8)])])
    write(tmp_path / "LaMP_2N", [asked], {"k": "sports"})
    [user], _ = read_lamp(tmp_path, min_history=1)
    assert user.tasks == ("LaMP_2N", "LaMP_4")
    assert [query.visible for query in user.queries] == [1, 4]
    assert [item.item_id for item in one_shot_history(user, "LaMP_4")] == ["i1", "i2"]
    [user], exclusions = read_lamp(tmp_path, min_history=2)
    assert user.tasks == ("LaMP_4",)
    assert reasons(exclusions) == {"too little history": 1}


def test_undated_histories_hold_nothing_that_is_scored(tmp_path):
    def item(name: str, title: str, text: str) -> dict:
        return {"id": name, "title": title, "text": text}

    fine = [item(f"f{i}", f"title {i}", f"text {i}") for i in range(3)]
    told = [item("a", "new", "Article, Q1!"), item("b", "g OF q2", "new")]
    folder = write(
        tmp_path / "LaMP_4", [question("q1", None, [*fine, told[1]]), question("q2", None, [*fine, told[0]])]
    )
    [user], exclusions = read_lamp(folder)
    assert [item.item_id for item in user.history] == ["f0", "f1", "f2"]
    assert [query.visible for query in user.queries] == [None, None]
    assert one_shot_history(user, "LaMP_4") == user.history
    assert order_of(user) == order_of(user, "LaMP_4") == "unknown"
    assert reasons(exclusions) == {"history item is scored (order unknown)": 2}


def test_a_tweet_that_is_scored_is_found_however_it_was_cut(tmp_path):
    tweets = [{"id": str(i), "text": f"one two three four {i}"} for i in range(4)]
    asked = {"id": "q", "input": "said otherwise", "profile": tweets}
    [user], _ = read_lamp(write(tmp_path / "LaMP_7", [asked], {"q": "one two three four 2 "}))
    assert [item.item_id for item in user.history] == ["0", "1", "3"]
    assert user.user_id == "LaMP_7-q"


def test_a_labels_equality_is_no_reason_to_leave_an_item_out(tmp_path):
    reviews = [{"id": str(i), "text": f"review {i}", "score": "5.0"} for i in range(3)]
    asked = {"id": "q", "input": "review 9", "profile": reviews}
    [user], _ = read_lamp(write(tmp_path / "LaMP_3", [asked], {"q": "5.0"}))
    assert [item.output for item in user.history] == ["5", "5", "5"]
    assert user.queries[0].gold == "5"


def test_left_out_is_counted(tmp_path):
    profile = [article(1), article(2), article(3, text="")]
    questions = [
        question("short", 9, profile, "bob"),
        question("mute", 9, profile, "cid"),
        *(question(f"q{day}", day, [*profile, article(4), article(5, date="")]) for day in (9, 10, 11)),
    ]
    golds = {name: "G" for name in ("short", "q9", "q10", "q11")}
    [user], exclusions = read_lamp(write(tmp_path / "LaMP_4", questions, golds), queries=2)
    assert [query.query_id for query in user.queries] == ["q9", "q10"]
    assert reasons(exclusions) == {
        "too little history": 1,
        "question without gold": 1,
        "history item without text": 1,
        "undated item in a dated history": 1,
        "more queries than population.queries": 1,
    }


def test_an_unknown_label_as_gold_is_counted(tmp_path):
    item = {"id": "1", "text": "x", "category": "sports", "title": "t"}
    asked = [{"id": name, "input": name, "profile": [item]} for name in "ab"]
    users, exclusions = read_lamp(write(tmp_path / "LaMP_2N", asked, {"a": "sports", "b": "golf"}), min_history=1)
    assert [user.user_id for user in users] == ["LaMP_2N-a"]
    assert reasons(exclusions) == {"gold is no label of the task": 1}


def test_items_are_told_apart_by_content_and_get_ids_of_their_own(tmp_path):
    twice = [article(1, id="x"), article(1, id="y"), article(2, id="x"), article(3, id="")]
    [user], _ = read_lamp(write(tmp_path / "LaMP_4", [question("q", 9, twice), question("r", 10, twice)]))
    assert [item.item_id for item in user.history] == ["x", "y", "x~2", "~3"]


def test_draws_are_deterministic_and_seeds_are_disjoint(tmp_path):
    profile = [article(day) for day in (1, 2, 3)]
    folder = write(tmp_path / "LaMP_4", [question(f"q{i}", 9, profile, f"u{i}") for i in range(10)])

    def ids(**draw: object) -> list[str]:
        return [user.user_id for user in read_lamp(folder, **draw)[0]]

    draws = [ids(users=3, seed_index=index) for index in range(3)] + [ids(users=3, skip=9, fewer=True)]
    assert sum(draws, []) == ids()
    assert sorted(ids()) == sorted(f"u{i}" for i in range(10))
    assert ids() == ids() != ids(draw_seed=1)
    with pytest.raises(UserError, match=r"users 10 to 12, but .*LaMP_4 has 10"):
        ids(users=3, seed_index=3)


def test_downloaded_layout_split_and_task_choice(tmp_path):
    profile = [article(day) for day in (1, 2, 3)]
    write(tmp_path / "LaMP-4" / "train", [question("q", 9, profile)], split="train")
    assert len(read_lamp(tmp_path, ["LaMP-4"], "train")[0]) == 1
    assert len(read_lamp(tmp_path / "LaMP-4" / "train", split="train")[0]) == 1
    renamed = write(tmp_path / "headlines", [question("q", 9, profile)])
    with pytest.raises(UserError, match="which task is this"):
        read_lamp(renamed)
    assert len(read_lamp(renamed, ["LaMP_4"])[0]) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dev_questions.json", "<html><body>Not found</body></html>", r"dev_questions\.json: holds HTML.*[Dd]ownload"),
        ("dev_questions.json", "", "is empty"),
        ("dev_questions.json", '{"id": "q"}', r"expected a list of questions, but the file starts with '\{'"),
        ("dev_questions.json", '[{"id": "q",\n "input": oops}]', r"dev_questions\.json:2:11: malformed JSON"),
        ("dev_questions.json", '[{"id": "q", "input": "x", "profile": []}', r":1:42: malformed JSON"),
        ("dev_questions.json", '[{"id": "q", "profile": []}]', r"question 1 \(id 'q'\): field 'input'"),
        ("dev_questions.json", "[3]", "question 1 is a int"),
        ("dev_outputs.json", "[]", "expected an object with golds"),
        ("dev_outputs.json", '{"task": "LaMP_4", "golds": []}', "no golds"),
        ("dev_outputs.json", '{"golds": [{"id": "q"}]}', "gold 1 needs the fields id and output"),
        (
            "dev_outputs.json",
            '{"golds": [{"id": "q", "output": "a"}, {"id": "q", "output": "b"}]}',
            "'q' appears twice",
        ),
        (
            "dev_outputs.json",
            '{"golds": [{"id": "q", "output": "a"}, {"id": "z", "output": "b"}]}',
            "1 golds without a question in dev_questions.json, the first is 'z'",
        ),
    ],
)
def test_broken_files_name_the_file_the_place_and_the_fix(tmp_path, name, text, message):
    folder = write(tmp_path / "LaMP_4", [question("q", 9, [article(day) for day in (1, 2, 3)])])
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_lamp(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": "soon"}, "question 'q': date: 'soon' is no date: write YYYY"),
        ({"profile": [{"id": "1", "text": "x"}]}, "profile item 1: no field 'title'; LaMP_4 needs text, title"),
        ({"profile": [article(1, date="2020-31-01")]}, "profile item 1: date: '2020-31-01' is no date"),
        ({"profile": ["x"]}, "profile item 1 is a str"),
        ({"input": "Generate a title for the following abstract of a paper: x"}, "asks LaMP_5's question"),
        ({"profile": []}, r"no user has 3 items of history \(population\.min_history\)"),
    ],
)
def test_questions_that_cannot_be_read_are_named(tmp_path, change, message):
    profile = [article(day) for day in (1, 2, 3)]
    folder = write(tmp_path / "LaMP_4", [question("q", 9, profile) | change])
    with pytest.raises(UserError, match=message):
        read_lamp(folder)


def test_ids_files_and_tasks_that_are_missing_or_double(tmp_path):
    profile = [article(day) for day in (1, 2, 3)]
    folder = write(tmp_path / "LaMP_4", [question("q", 9, profile), question("q", 10, profile)])
    with pytest.raises(UserError, match="question 'q' appears twice"):
        read_lamp(folder)
    with pytest.raises(UserError, match="no such folder"):
        read_lamp(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"population\.tasks: LaMP_5 has no dev_questions\.json.*found: LaMP_4"):
        read_lamp(tmp_path, ["LaMP_5"])
    with pytest.raises(UserError, match=r"unknown task `LaMP_9`"):
        read_lamp(tmp_path, ["LaMP_9"])
    with pytest.raises(UserError, match=r"no test_questions\.json"):
        read_lamp(tmp_path, split="test")
    (folder / "dev_outputs.json").unlink()
    with pytest.raises(UserError, match=r"dev_outputs\.json: no such file"):
        read_lamp(tmp_path)


@pytest.mark.skipif("UNTETHER_REAL_DATA" not in os.environ, reason="UNTETHER_REAL_DATA is not set")
def test_real_histories():
    root = Path(os.environ["UNTETHER_REAL_DATA"]) / "lamp"
    sizes = {"LaMP_2N": (27, 98), "LaMP_3": (117, 118), "LaMP_4": (44, 157), "LaMP_5": (23, 23), "LaMP_7": (300, 300)}
    for task, (users, asked) in sizes.items():
        read, exclusions = read_lamp(root / task)
        assert len(read) == users
        assert sum(len(user.queries) for user in read) + reasons(exclusions)["too little history"] == asked
        assert {order_of(user) for user in read} == {"time" if task in ("LaMP_2N", "LaMP_4") else "unknown"}
    several = [user for user in read_lamp(root)[0] if len(user.tasks) > 1]
    assert len(several) == 27
    for user in several:
        first = min(query.time_s for query in user.queries)
        assert all(item.time_s < first for task in user.tasks for item in one_shot_history(user, task))
