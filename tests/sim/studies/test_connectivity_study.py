"""The study `connectivity` on tables small enough to work out by hand, and its cells."""

import math

import pandas as pd
import pytest

from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.run.tables import TABLES
from untether.sim.studies import Study
from untether.sim.studies.connectivity.connectivity import by_user, findings, label_answers, measure, places
from untether.sim.studies.connectivity.figures import span
from untether.sim.time.service import first_live, trainings, wasted

HOUR_S = 3600.0


def table(name, rows):
    """Rows as a finished table of a run has them: every column, null where nothing is said."""
    return pd.DataFrame([{"seed": 1, **row} for row in rows]).reindex(columns=TABLES[name].names)


def train(device, round, on, begun_h, took_h, outcome="ok", arm="collaborative", energy_j=10.0):
    return {
        "device_id": device, "round": round, "arm": arm, "kind": "train", "outcome": outcome,
        "time_s": begun_h * HOUR_S, "duration_s": took_h * HOUR_S, "energy_j": energy_j, "detail": f"on {on}, 4 steps",
    }  # fmt: skip


def request(device, outcome, up=0, down=0, tokens=0, queued_s=None, energy_j=1.0):
    return {
        "device_id": device, "round": 0, "kind": "augment", "outcome": outcome, "time_s": 60.0, "duration_s": 5.0,
        "bytes_up": up, "bytes_down": down, "tokens_in": tokens, "energy_j": energy_j, "queued_s": queued_s,
    }  # fmt: skip


def asked(device, round, hour, adapter_h=None, score=0.5, arm="collaborative"):
    """An answer at an hour of the run, by an adapter that is live since another (None: by the base)."""
    return {
        "device_id": device, "user_id": f"u{device}", "round": round, "arm": arm, "task": "LaMP_7", "score": score,
        "answered_time_s": hour * HOUR_S, "answered_by": "base" if adapter_h is None else "adapter",
        "adapter_time_s": None if adapter_h is None else adapter_h * HOUR_S, "outcome": "ok",
    }  # fmt: skip


EVENTS = table("events", [
    request("a", "dropped", up=300, energy_j=2.0),
    request("a", "ok", up=1000, down=700, tokens=90, queued_s=12.5),
    request("b", "offline", energy_j=0.0),
    request("b", "timeout", up=1000, energy_j=3.0, queued_s=300.0),
    request("c", "ok", up=1000, down=500, tokens=90, queued_s=0.0, energy_j=1.0),
    train("a", 0, "real", 1, 1, "superseded", energy_j=4.0),
    train("a", 0, "samples", 3, 2),
    train("b", 0, "real", 1, 2),
    train("b", 2, "stale_samples", 50, 2),
    train("c", 1, "samples", 25, 1),
    train("c", 3, "samples", 90, 48),  # live on day 5.75: after the end
    train("a", 0, "real", 1, 1, arm="local"),
])  # fmt: skip


def test_trainings_and_their_first():
    made = trainings(EVENTS, "collaborative")
    assert [(row.device_id, row.on, row.live_s / HOUR_S) for row in made.itertuples()] == [
        ("a", "samples", 5), ("b", "real", 3), ("b", "stale_samples", 52), ("c", "samples", 26), ("c", "samples", 138)
    ]  # fmt: skip
    devices = pd.DataFrame({"seed": 1, "device_id": ["a", "a", "b", "c", "d"]})
    first = first_live(made[made["on"] != "real"], devices, end_s=1.5 * DAY_S)
    assert list(first["device_id"]) == ["a", "b", "c", "d"] and list(first["seen"]) == [True, False, True, False]
    assert list(first["time_s"] / HOUR_S) == [5, 36, 26, 36]


def test_what_came_to_nothing_is_wasted():
    found = wasted(EVENTS, "collaborative").set_index("device_id")
    assert found["bytes"].to_dict() == {"a": 2000, "b": 1000, "c": 1500}
    assert found["bytes_wasted"].to_dict() == {"a": 300, "b": 1000, "c": 0}
    assert found["energy_j"].to_dict() == {"a": 2 + 1 + 4 + 10, "b": 3 + 20, "c": 1 + 20}
    assert found["energy_wasted_j"].to_dict() == {"a": 2 + 4, "b": 3, "c": 0}


PREDICTIONS = table("predictions", [
    *(row for device, score in (("a", 0.4), ("b", 0.5), ("c", 0.6)) for row in (
        asked(device, 0, 12, arm="frozen", score=0.1), asked(device, 0, 12, 2, arm="local", score=score),
    )),
    asked("a", 0, 4), asked("a", 0, 17, 5), asked("a", 2, 65, 5, score=0.9), asked("a", 3, 77, 5, score=0.7),
    asked("b", 0, 12, 3, score=0.4), asked("b", 2, 64, 52, score=0.4),
    asked("c", 0, 12, score=0.0), asked("c", 3, 98, 26, score=0.2),
])  # fmt: skip


def test_who_answered_and_how_old_it_was():
    """Asked for every third round, an adapter of round 0 is overdue in round 3, one of round 1 is not."""
    made = trainings(EVENTS, "collaborative")
    found = label_answers(PREDICTIONS, made, most=3)
    own = found[found["arm"] == "collaborative"]
    assert list(own["kind"]) == ["base", "fresh", "fresh", "stale", "own_data", "stale", "base", "fresh"]
    assert own["age_d"].dropna().tolist() == pytest.approx([0.5, 2.5, 3.0, 0.375, 0.5, 3.0])
    assert found.loc[found["arm"] != "collaborative", "kind"].isna().all()
    never = label_answers(PREDICTIONS, made, most=math.inf)
    assert (never["kind"] == "stale").sum() == 1, "made with samples of an earlier time, however the policy is"


def test_a_rounding_error_does_not_hide_what_an_adapter_was_made_of():
    apart = PREDICTIONS.assign(adapter_time_s=PREDICTIONS["adapter_time_s"] + 1e-9)
    made = trainings(EVENTS, "collaborative")
    assert label_answers(apart, made, 3)["kind"].tolist() == label_answers(PREDICTIONS, made, 3)["kind"].tolist()


def test_users_and_their_means():
    found = by_user(label_answers(PREDICTIONS, trainings(EVENTS, "collaborative"), 3)).set_index("user_id")
    assert found.loc["ua", ["fresh", "stale", "own_data", "base"]].tolist() == [0.5, 0.25, 0, 0.25]
    assert found.loc["ub", ["fresh", "stale", "own_data", "base"]].tolist() == [0, 0.5, 0.5, 0]
    assert found["gain"].tolist() == pytest.approx([0.65 - 0.4, 0.4 - 0.5, 0.1 - 0.6])
    assert found["age_d"].tolist() == pytest.approx([2.0, (0.375 + 0.5) / 2, 3.0])


def test_a_cell_measured():
    experiment = Experiment.build({"rounds": 4, "drift": {"every": 3}}, None, "test")
    _, rows, curve = measure(experiment, PREDICTIONS, EVENTS)
    (row,) = rows.to_dict("records")
    assert (row["task"], row["metric"], row["n_users"]) == ("LaMP_7", "rouge1", 3)
    assert row["gain"] == pytest.approx((0.25 - 0.1 - 0.5) / 3) and row["gain_low"] < row["gain"] < row["gain_high"]
    assert row["gain_of_base"] == pytest.approx(0.1 - 0.5)
    assert row["fresh"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert row["bytes_wasted"] == pytest.approx(1300 / 3) and row["bytes_wasted_share"] == pytest.approx(1300 / 4500)
    assert row["energy_wasted_share"] == pytest.approx(9 / 61)
    # All three have an adapter made with samples, at hours 5, 26 and (of an earlier time) 52.
    assert row["half_have_samples_d"] == pytest.approx(26 / 24) and row["without_samples"] == 0
    assert curve["share"].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert (row["queued_p50_s"], row["queued_p95_s"]) == pytest.approx((12.5, 12.5 + 0.9 * 287.5))


def test_an_error_is_turned_so_that_more_is_better():
    rows = PREDICTIONS.assign(task="LaMP_3")
    found = by_user(label_answers(rows, trainings(EVENTS, "collaborative"), 3))
    assert found["gain"].tolist() == pytest.approx([0.4 - 0.65, 0.5 - 0.4, 0.6 - 0.1])


# --- the cells ------------------------------------------------------------------------------------------------


def test_every_cell_is_informative():
    study = Study.read("connectivity")
    networks = [cell.experiment.network for cell in study.cells]
    always = [network for network in networks if network.availability == 1]
    never = [network for network in networks if network.availability == 0]
    assert len(always) == 1 and sorted(n.fallback for n in never) == ["real_data", "stale_samples", "wait"]
    between = {(n.availability, n.mean_down_s, n.fallback) for n in networks if 0 < n.availability < 1}
    steps, gaps = ({place[i] for place in between} for i in range(2))
    assert gaps == {600, 6 * 3600, 3 * DAY_S, 14 * DAY_S} and len(steps) >= 2
    assert len(between) == len(steps) * len(gaps) * 3 == len(networks) - 4
    common = study.cells[0].experiment
    assert common.arms == ("frozen", "local", "collaborative") and common.cloud.capacity.concurrency
    assert common.hardware.queries == "day" and common.drift.every < common.rounds


def test_a_cell_stands_for_every_place_that_it_is_no_different_from():
    study = Study.read("connectivity", grid={"network.mean_down_s": "600,21600", "network.availability": "0.5,1"})
    frame = pd.DataFrame([{"cell": cell.name, **cell.words, "value": i} for i, cell in enumerate(study.cells)])
    spread = places(study, frame)
    assert len(study.cells) == 7 and len(spread) == 2 * 2 * 3
    assert spread[spread["network.availability"] == 1]["value"].nunique() == 1
    assert len(spread[spread["network.availability"] == 0.5]) == 6
    assert len(spread.groupby(["network.availability", "network.mean_down_s", "network.fallback"])) == 12


def test_what_is_moot_must_be_an_axis(tmp_path):
    text = 'name = "x"\nquestion = "?"\n[grid]\n"cloud.samples" = [0, 8]\n'
    (tmp_path / "x.toml").write_text(text + '[moot."cloud.sample"]\n"cloud.samples" = [0]\n')
    with pytest.raises(UserError, match="moot: unknown axis `cloud.sample`. Did you mean `cloud.samples`"):
        Study.read(str(tmp_path / "x.toml"))


# --- in words -------------------------------------------------------------------------------------------------


def test_findings_name_effects_and_say_where_there_is_none():
    study = Study.read("connectivity", grid={"network.mean_down_s": "600,1209600", "network.availability": "1,0.1"})
    gains = {(1.0, 600.0): 0.06, (0.1, 600.0): 0.06, (0.1, 1209600.0): 0.01}
    worse = {"real_data": 0.0, "wait": -0.2, "stale_samples": 0.0}
    users, rows = [], []
    for cell in study.cells:
        spot = (cell.values["network.availability"], cell.values["network.mean_down_s"])
        for user in range(12):
            noise = 0.01 * (-1) ** user * (1 if spot[0] == 1 else 2)
            gain = gains[spot] + noise + (worse[cell.values["network.fallback"]] if spot[0] < 1 else 0)
            who = {"seed": 1, "user_id": f"u{user}", "cluster": f"u{user}", "task": "LaMP_7"}
            users.append({"cell": cell.name, **cell.words, **who, "gain": gain})
        late = spot[1] > 600
        rows.append({
            "cell": cell.name, **cell.words, "task": "LaMP_7", "fresh": 0.25 if late else 0.75,
            "half_have_samples_d": math.inf if late else 0.25, "without_samples": 0.8 if late else 0.0,
            "without_samples_low": 0.6, "without_samples_high": 0.9,
        })  # fmt: skip
    gain, fallback, first = findings(study, places(study, pd.DataFrame(users)), places(study, pd.DataFrame(rows)))
    assert "at availability 1 `collaborative` gains +0.060" in gain
    assert "changes by +0.000" in gain and "(no difference shown) with gaps of 10 min" in gain
    assert "-0.050 [-0.057, -0.043] with gaps of 14 d" in gain
    assert "`wait` -0.200 [-0.200, -0.200]" in fallback
    assert "`stale_samples` +0.000 [+0.000, +0.000] (no difference shown)" in fallback
    assert "half of the devices had it after 6.0 hours, all in the end" in first
    assert "with gaps of 14 d most devices never had one, 80% [60%, 90%] had none in the end" in first


def test_spans():
    assert [span(value) for value in (600.0, 21600.0, 259200.0, 1209600.0, 5400.0)] == [
        "10 min", "6 h", "3 d", "14 d", "1.5 h"
    ]  # fmt: skip
