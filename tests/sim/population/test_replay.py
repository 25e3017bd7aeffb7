"""Histories that move through rounds: what is known when, what is asked when, and that no order is ever broken."""

from __future__ import annotations

from sim.population.order import asked, known_history, one_shot_history
from sim.records import Interaction, Query, User

DAY_S = 86_400.0


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
