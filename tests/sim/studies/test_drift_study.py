"""The measures of the study `drift`, worked out by hand on small frames, and what its cells are to each other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.studies import Study
from untether.sim.studies.drift import away as away_study
from untether.sim.studies.drift.away import away_days
from untether.sim.studies.drift.away import findings as away_findings
from untether.sim.studies.drift.drift import COLUMNS, _twins
from untether.sim.studies.drift.figures import draw
from untether.sim.studies.drift.measures import (
    along,
    costs,
    detections,
    falling,
    fresh_for,
    front,
    gain_over_frozen,
    half_life,
    overall,
    paired,
    reach,
    with_age,
)
from untether.sim.studies.drift.prose import sentences

COMMON = {"seed": 1, "task": "LaMP_4", "users": "changed", "since": np.nan, "arm": "collaborative"}


def told(*rows, **more):
    """Answers: (device, round, age, good)."""
    frame = pd.DataFrame(rows, columns=["device_id", "round", "age", "good"])
    return frame.assign(**COMMON, query_id=[f"{d}-{r}" for d, r, *_ in rows], **more)


def test_an_age_counts_from_the_last_training():
    answers = told(("a", 0, 0, 0), ("a", 3, 0, 0), ("a", 5, 0, 0), ("b", 0, 0, 0), ("b", 5, 0, 0)).drop(columns="age")
    trained = pd.DataFrame({"seed": 1, "device_id": ["a", "b", "a"], "round": [0, 2, 4]})
    found = with_age(answers.assign(answered_by="adapter"), trained).set_index(["device_id", "round"])["age"]
    assert found.to_dict() == pytest.approx(
        {("a", 0): 0, ("a", 3): 3, ("a", 5): 1, ("b", 0): np.nan, ("b", 5): 3}, nan_ok=True
    )
    assert with_age(answers.assign(answered_by="base"), trained)["age"].isna().all()


def test_decay_compares_the_same_queries_by_the_age_of_the_stale_adapter():
    fresh = told(("a", 0, 0, 0.9), ("a", 1, 0, 0.8), ("b", 1, 0, 0.7), ("b", 2, 0, 0.6), ("c", 1, 0, 0.1))
    stale = told(("a", 0, 0, 0.9), ("a", 1, 1, 0.6), ("b", 1, 0, 0.7), ("b", 2, 1, 0.2), ("b", 0, np.nan, 0.3))
    both = paired(fresh, stale)
    assert len(both) == 4  # c has no stale answer, and b of day 0 no adapter
    curve = along(both, "age", "apart").set_index("from")
    assert curve.loc[0, ["value", "low", "high"]].tolist() == [0, 0, 0]
    assert curve.loc[1, "value"] == pytest.approx((0.2 + 0.4) / 2)
    reach = 12.706 * 0.1  # Student's t with one degree of freedom, times the standard error of 0.2 and 0.4
    assert curve.loc[1, ["low", "high"]].tolist() == pytest.approx([0.3 - reach, 0.3 + reach], abs=1e-3)
    assert overall(both, "apart")[0] == pytest.approx((0.1 + 0.2) / 2) and overall(both, "apart")[3] == 2


def test_users_count_equally_however_much_they_ask():
    frame = told(("a", 0, 0, 1.0), ("a", 1, 1, 1.0), ("a", 2, 2, 1.0), ("b", 0, 0, 0.0))
    (row,) = along(frame, "age", "good", width=3).itertuples()
    assert (row[1], row[2], row.value, row.n_users) == (0, 2, 0.5, 2)


def test_days_before_a_change_are_binned_apart_from_those_after():
    frame = told(("a", 0, 0, 1.0), ("a", 1, 1, 0.0)).assign(since=[-1, 0])
    assert along(frame, "since", "good", width=3)[["from", "to", "value"]].values.tolist() == [[-3, -1, 1], [0, 0, 0]]


def test_no_mean_goes_beyond_the_age_that_all_users_reach():
    asked = told(("a", 9, 9, 0), ("b", 9, 4, 0), ("b", 0, np.nan, 0), ("a", 2, 2, 0), ("c", 9, 7, 0))
    assert reach(asked) == 4
    assert reach(asked.assign(users="real")) == 7, "or half of those who ask when they like"


def test_a_gain_is_over_the_base_models_answer_to_the_same_query():
    mine = told(("a", 1, 0, 0.8), ("a", 2, 1, 0.5))
    base = told(("a", 1, np.nan, 0.3), ("a", 2, np.nan, 0.6)).assign(arm="frozen")
    assert gain_over_frozen(pd.concat([mine, base]))["gain"].tolist() == pytest.approx([0.5, -0.1])


def gains(curves):
    rows = [(f"d{n}", age, age, gain) for n, curve in enumerate(curves) for age, gain in enumerate(curve)]
    return told(*rows).rename(columns={"good": "gain"})


def test_a_half_life_by_hand():
    # falls by 0.1 a day from 0.4: half of it, 0.2, after two days; from 0.3 by 0.1: 0.15 after one and a half
    assert half_life(gains([[0.4, 0.3, 0.2, 0.1, 0.0]] * 3), 4) == (2.0, 2.0, 2.0)
    assert half_life(gains([[0.3, 0.2, 0.1, 0.0]] * 2), 3)[0] == pytest.approx(1.5)
    # 0.4, then 0.1 and 0.3, which pool to 0.2: reached on the first of the two days
    assert half_life(gains([[0.4, 0.1, 0.3, 0.0]] * 2), 3)[0] == pytest.approx(1.0)


def test_a_half_life_that_is_not_reached_or_has_nothing_to_halve():
    assert half_life(gains([[0.4, 0.4, 0.3]] * 4), 2) == (np.inf, np.inf, np.inf)
    assert np.isnan(half_life(gains([[-0.1, -0.2]] * 4), 1)).all()
    days, low, high = half_life(gains([[0.4, 0.0]] * 5 + [[0.4, 0.4]] * 3), 1)
    assert days == pytest.approx(0.8) and low < days and high == np.inf  # some draws never halve
    assert half_life(gains([[0.4, 0.0, 0.0]]), 1)[0] == pytest.approx(0.5)  # ages beyond are not looked at


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.5, 9)), min_size=1, max_size=8))
def test_the_nearest_falling_curve(points):
    values, weights = (np.array(column) for column in zip(*points, strict=True))
    fitted = falling(values, weights)
    assert (np.diff(fitted) <= 1e-12).all()
    assert fitted @ weights == pytest.approx(values @ weights, abs=1e-9)
    assert falling(fitted, weights) == pytest.approx(fitted, abs=1e-9)


def test_alarms_before_a_change_are_false_and_the_first_one_after_it_has_a_delay():
    users = pd.MultiIndex.from_product([[1], ["early", "late", "deaf", "calm"]], names=["seed", "device_id"])
    changed_on = pd.Series([10.0, 10.0, 10.0, np.nan], users)
    times = {"early": [0, 4, 10], "late": [2, 13, 20], "deaf": [0], "calm": [1, 8, 9]}
    trained = pd.DataFrame([(1, d, r) for d, of in times.items() for r in of], columns=["seed", "device_id", "round"])
    found = detections(trained, changed_on, 30).droplevel("seed")
    assert found["false"].to_dict() == {"early": 1, "late": 0, "deaf": 0, "calm": 2}
    assert found["quiet"].to_dict() == {"early": 9, "late": 7, "deaf": 9, "calm": 28}
    assert found["delay"].dropna().to_dict() == {"early": 0, "late": 3}


def test_costs_are_those_of_every_event_and_nothing_for_who_has_none():
    events = pd.DataFrame([
        {"kind": "augment", "outcome": "timeout", "bytes_up": 100, "bytes_down": None, "tokens_in": 30,
         "tokens_out": None, "energy_j": 1.0, "duration_s": 60.0},
        {"kind": "augment", "outcome": "ok", "bytes_up": 100, "bytes_down": 50, "tokens_in": 30, "tokens_out": 20,
         "energy_j": 2.0, "duration_s": 60.0},
        {"kind": "train", "outcome": "ok", "tokens_in": 999, "energy_j": 10.0, "duration_s": 120.0},
        {"kind": "train", "outcome": "superseded", "energy_j": 5.0, "duration_s": 30.0},
    ]).assign(seed=1, device_id="a")  # fmt: skip
    users = pd.MultiIndex.from_tuples([(1, "b"), (1, "a")], names=["seed", "device_id"])
    found = costs(events, users)
    assert found.loc[(1, "a")].to_dict() == {"refreshes": 1, "bytes": 250, "tokens": 80, "energy_j": 18, "minutes": 2.5}
    assert found.loc[(1, "b")].sum() == 0


def test_the_front():
    # dear and good; cheap and bad; as dear as the first and worse; between; dominated by the one between
    assert front([9, 1, 9, 5, 6], [0.9, 0.2, 0.8, 0.6, 0.5]) == [True, True, False, True, False]
    assert front([1, 1], [0.5, 0.5]) == [True, True]


def cell(**fields):
    data = {"rounds": 3, "population": {"replay": True, "max_history": 6}, "training": {"start": "anew"}, **fields}
    return Experiment.model_validate(data)


def test_who_is_compared_with_whom():
    daily, never = cell(), cell(drift={"policy": "never"})
    grown = cell(population={"replay": True})
    keep, going_on = cell(drift={"samples": "keep"}), cell(training={})
    assert fresh_for(never, daily) and not fresh_for(never, grown) and not fresh_for(never, keep)
    assert not fresh_for(daily, daily)
    assert all(_twins(daily, other) for other in (grown, keep, going_on))
    both = cell(population={"replay": True}, drift={"samples": "keep"})
    others = (daily, never, both, cell(drift={"every": 2, "samples": "keep"}))
    assert not any(_twins(daily, other) for other in others) and not _twins(keep, daily)


def test_the_cells_differ_in_what_they_should():
    study = Study.read("drift")
    assert {cell.values["change"] for cell in study.cells} == {"gradual", "abrupt"}
    assert {cell.experiment.drift.stagger for cell in study.cells} == {10}
    assert {cell.experiment.training.start for cell in study.cells} == {"anew"}
    real = {"population.source": "lamp", "population.path": "somewhere"}
    (only,) = Study.read("drift", real, {"change": "none", "policy": "weekly"}).cells
    assert only.experiment.population.source == "lamp"


def row(measure, value, low=np.nan, high=np.nan, **more):
    common = {"change": "abrupt", "policy": "never", "reference": "daily", "users": "changed", "n_users": 20}
    return {**common, "measure": measure, "value": value, "low": low, "high": high, "from": 3, "to": 5, **more}


def test_findings_say_what_the_numbers_say_and_what_they_do_not():
    alone = {"reference": ""}
    table = pd.DataFrame([
        row("decay", 0.01, -0.02, 0.04, **{"from": 1, "to": 2}), row("decay", 0.2, 0.1, 0.3),
        row("decay", 0.0, -0.01, 0.01, users="unchanged"),
        row("half-life", np.inf, 9.0, np.inf, to=20, **alone),
        row("half-life", np.nan, users="unchanged", **alone),
        row("held back after the change", 0.01, -0.02, 0.04, policy="weekly_keep", reference="weekly"),
        row("on the front", 1, **alone), row("on the front", 0, policy="daily", **alone),
        row("tokens", 1500, users="all", **alone), row("tokens", 9000, users="all", policy="daily", **alone),
    ], columns=COLUMNS)  # fmt: skip
    found, notes = sentences(table, cell())
    text = "\n".join(found)
    assert "has lost +0.200 [+0.100, +0.300] against `daily` on the same queries; clear of zero from day 3 on." in text
    assert "unchanged users: at an age of 3 to 5 days" in text and "not shown to be a loss" in text
    assert "at no age up to 20 days (not reached; the interval begins at 9.0 days)" in text
    assert "`never` is not shown to have a gain over the base model that could halve" in text
    assert "not shown to be held back or helped" in text
    assert "`never` (1.5k tokens a user); beaten: `daily`" in text
    assert "mechanism check" in notes[0]
    real = cell(population={"source": "lamp", "path": "x", "replay": True, "round_days": 90})
    assert "cannot be measured" in sentences(table, real)[1][0]
    assert "a round, which stands for 90 days of the calendar" in sentences(table, real)[1][0]
    nobody = pd.DataFrame([row("decay", 0.0, 0.0, 0.0, **{"from": 0, "to": 0})], columns=COLUMNS)
    assert "its decay is not known" in sentences(nobody, real)[0][0]


def test_figures_are_drawn_of_what_there_is():
    table = pd.DataFrame([
        row("score", 0.8, 0.7, 0.9, reference=""), row("score by day", 0.8, 0.7, 0.9, reference=""),
        row("tokens", 1500, users="all", reference=""), row("on the front", 1, reference=""),
    ], columns=COLUMNS)  # fmt: skip
    assert set(draw(table)) == {"3-days", "5-price"}


def test_an_absence_lasts_to_the_end():
    def away(*outages):
        return away_days(cell(rounds=10, network={"outages": outages}))

    assert (away(), away("6d+4d"), away("6d+9d")) == (0, 4, 4)
    for outages in (("2d+4d",), ("6d+4d:50%",), ("1d+1d", "6d+4d")):
        with pytest.raises(UserError, match=r"network\.outages"):
            away(*outages)


def test_an_absence_is_judged_on_the_days_that_all_absences_cover(monkeypatch):
    """A device that is away loses 0.1 a day, twice that at the higher rate; before its absence, nothing."""
    study = Study.read("away", {"rounds": "24"}, {"drift.rate": "0.01,0.02", "away": "online,4d,8d"})
    frames = {}
    for cell in study.cells:
        start = 24 - away_days(cell.experiment)
        slope = 0.1 * cell.experiment.drift.rate / 0.01
        frames[cell.name] = told(*((d, r, 0, 1 - slope * max(0, r - start + 1)) for d in "ab" for r in range(24)))
    monkeypatch.setattr(away_study, "read_answers", frames.__getitem__)
    table, days = away_study.losses(study, {cell.name: cell.name for cell in study.cells})
    assert days == "days 20 to 23"
    assert table[["rate", "away", "days"]].values.tolist() == [
        [0.01, "4d", 4], [0.01, "8d", 8], [0.02, "4d", 4], [0.02, "8d", 8]
    ]  # fmt: skip
    # 4 days away: 0.1, 0.2, 0.3, 0.4 on the four days; 8 days away: 0.5 to 0.8
    assert table["value"].tolist() == pytest.approx([0.25, 0.65, 0.5, 1.3])
    assert len(away_study.draw(table).axes) == 2
    only = Study.read("away", None, {"away": "4d"})
    with pytest.raises(UserError, match="cells without"):
        away_study.losses(only, {cell.name: "rate=0.01,away=4d" for cell in only.cells})


def test_how_long_a_device_may_stay_away():
    table = pd.DataFrame([
        (0.01, "4d", 4, 0.001, -0.01, 0.015, 9), (0.01, "8d", 8, 0.03, -0.01, 0.07, 9),
        (0.04, "4d", 4, 0.05, 0.02, 0.08, 9), (0.04, "8d", 8, 0.09, 0.05, 0.2, 9),
    ], columns=["rate", "away", "days", "value", "low", "high", "n_users"])  # fmt: skip
    _, slow, fast = away_findings(table, "days 8 to 11", 0.02)
    assert slow.endswith("no absence is shown to cost anything; up to 4 days cost less than 0.02.")
    assert fast.endswith("a loss is shown from 4 days on; no absence is shown to cost less than 0.02.")
