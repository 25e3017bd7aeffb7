"""The study of scale on small tables: fits by hand, gains by length of history, sentences that follow the numbers."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from untether.sim.experiment import Experiment
from untether.sim.population.source import open_population
from untether.sim.studies import Study
from untether.sim.studies.scale.prose import exponent, findings
from untether.sim.studies.scale.scale import by_history, measure


def _cells(**more):
    devices = [10, 100, 1000]
    table = {
        "fleet": ["10", "100", "1000"], "cloud": "4 places", "devices": devices, "learners": devices, "cold": True,
        "wall_s": [22.0, 40.0, 220.0], "cpu_s": [0.5 * n**0.9 for n in devices],
        "peak_memory_gib": [2.0 * n**0.1 for n in devices], "queued_p50_s": [0.0, 3.0, 600.0],
        "queued_p95_s": [0.0, 30.0, 3000.0], "queued_p99_s": [0.0, 60.0, 5000.0], "busiest_answers_per_s": 0.8,
        "rate_limited_requests": [0.0, 0.0, 0.25], "answered": [1.0, 1.0, 0.5], "money": [0.01, 0.1, 1.0],
        "h_to_50": [0.5, 0.6, 2.0], "h_to_90": [0.7, 0.9, np.inf], "h_to_99": [0.8, 1.0, np.inf], **more,
    }  # fmt: skip
    return pd.DataFrame(table)


def test_the_study_varies_fleet_and_cloud_and_each_size_has_its_own_users():
    study = Study.read("scale")
    assert study.axes == ("fleet", "cloud") and len(study.cells) == 12
    sizes = {cell.values["fleet"]: cell.experiment for cell in study.cells}
    assert [e.population.users for e in sizes.values()] == [10, 100, 1000]
    assert len({e.seeds for e in sizes.values()}) == 3
    assert len(Study.read("scale", grid={"fleet": "10000"}).cells) == 4
    large = Study.read("scale", grid={"fleet": "100000,1000000"}).cells
    assert {(cell.experiment.population.users, cell.experiment.engine.learners) for cell in large} == {
        (100_000, 1000), (1_000_000, 1000),
    }  # fmt: skip


def test_where_some_learn_it_says_so_and_no_cost_of_a_device_is_read_from_it():
    some = _cells().iloc[[2]].assign(devices=50_000, learners=1000, wall_s=5000.0, cpu_s=1.0)
    cells = pd.concat([_cells(), some], ignore_index=True)
    nothing = pd.DataFrame(columns=["task", "arm"])
    said, simulation, *_ = findings(cells, nothing)
    assert said.startswith("Of 50,000 devices 1,000 learned, in 5000 s") and "Extrapolated" in said
    assert "0.20 s a device" in simulation and exponent(cells, "cpu_s")[0] == pytest.approx(0.9)


def test_devices_that_do_not_learn_count_among_those_that_wait_for_an_adapter():
    study, _ = _study(2, learners=1)
    rows = [
        {"seed": 1, "time_s": 60.0, "request_id": f"r{n}", "attempt": 0, "device_id": f"d{n}", "kind": "augment",
         "outcome": "ok", "duration_s": 10.0, "tokens_in": 1, "tokens_out": 1, "queued_s": 0.0} for n in range(2)
    ] + [
        {"seed": 1, "time_s": 3600.0, "device_id": "d1", "arm": "collaborative", "kind": "train", "outcome": "ok",
         "round": 0, "duration_s": 3600.0, "detail": "on samples"}
    ]  # fmt: skip
    tables = {"events": pd.DataFrame(rows), "metrics": pd.DataFrame({"seed": 1, "device_id": ["d0"]})}
    row = measure(study, {name: _Run(tables=tables) for name in "ab"}).iloc[0]
    assert (row["devices"], row["learners"]) == (2, 1)
    assert row["h_to_50"] == pytest.approx(2.0) and np.isinf(row["h_to_90"])


def test_exponents_are_those_of_a_power_law_over_cold_cells():
    cells = _cells()
    assert exponent(cells, "cpu_s") == (pytest.approx(0.9), pytest.approx(0.5))
    warm = pd.concat([cells, cells.assign(cold=False, cpu_s=1.0)])
    assert exponent(warm, "cpu_s")[0] == pytest.approx(0.9)
    assert np.isnan(exponent(cells[:1], "cpu_s")[0])


def test_sentences_follow_the_numbers():
    quality = pd.DataFrame(
        [("collaborative", "LaMP_3", 3, 4, 0.1, -0.05, 0.2, 30), ("collaborative", "LaMP_3", 16, 16, 0.4, 0.3, 0.5, 9)],
        columns=["arm", "task", "least", "most", "gain", "low", "high", "users"],
    )
    simulation, cloud, gain = findings(_cells(), quality)
    assert "20 s whatever the fleet, and 0.20 s a device" in simulation  # (220 - 22) / 990 = 0.2; 22 - 10 x 0.2 = 20
    assert "power of 0.90" in simulation and "power of 0.10" in simulation
    assert "0.7 h, of 1,000 after more than the run" in cloud and "50.0% of the requests" in cloud
    assert "wait 10 min or more" in cloud and "25% of their requests are turned away" in cloud
    assert "+0.100 [-0.050, +0.200] (30 users) for users with 3 to 4 items" in gain


class _Run(SimpleNamespace):
    """A finished run's tables, by hand."""

    def read(self, table, columns=None):
        return self.tables[table] if columns is None else self.tables[table][list(columns)]

    def read_json(self, name):
        return {"usage": {"wall_s": 9.0, "cpu_s": 12.0, "peak_memory_bytes": 2**31}}


def _study(users, learners=0):
    experiment = Experiment.read(None, {"population.users": str(users), "population.tasks": "LaMP_3",
                                        "population.history": "3,16", "cloud.capacity.price_in": "2",
                                        "engine.learners": str(learners)})  # fmt: skip
    cells = [SimpleNamespace(name=name, experiment=experiment, words={"fleet": "x", "cloud": name}) for name in "ab"]
    return SimpleNamespace(cells=cells), experiment


def test_gains_are_paired_by_user_and_turned_and_grouped_by_their_histories():
    study, experiment = _study(12)
    population = open_population(experiment, 1)
    rows, expected = [], {}
    for index in range(12):
        user = population.user(index)
        length = len(user.history)
        for arm, score in (("frozen", 2.0), ("collaborative", 2.0 - 0.1 * length)):
            rows.append({"seed": 1, "user_id": user.user_id, "arm": arm, "task": "LaMP_3", "score": score})
        bucket = max(least for least in (3, 5, 8, 12, 16) if least <= length)
        expected.setdefault(bucket, []).append(0.1 * length)
    found = by_history(study, {name: _Run(tables={"predictions": pd.DataFrame(rows)}) for name in "ab"})
    assert dict(zip(found["least"], found["gain"], strict=True)) == {
        least: pytest.approx(np.mean(gains)) for least, gains in sorted(expected.items())
    }
    assert found["users"].sum() == 12 and len(expected) > 2


def test_a_row_a_cell_and_only_the_first_of_a_size_is_cold():
    study, _ = _study(2)
    events = pd.DataFrame([
        {"seed": 1, "time_s": 60.0 * n, "request_id": f"r{n}", "attempt": 0, "device_id": f"d{n}", "arm": None,
         "kind": "augment", "outcome": "ok", "duration_s": 10.0, "bytes_up": 1, "bytes_down": 1, "tokens_in": 500_000,
         "tokens_out": 0, "energy_j": 0.0, "queued_s": 4.0 * n, "detail": ""} for n in range(2)
    ] + [
        {"seed": 1, "time_s": 3600.0, "device_id": "d0", "arm": "collaborative", "kind": "train", "outcome": "ok",
         "round": 0, "duration_s": 3600.0, "energy_j": 1.0, "detail": "on samples, 3 steps"}
    ])  # fmt: skip
    metrics = pd.DataFrame({"seed": 1, "device_id": ["d0", "d1", "d1"]})
    table = measure(study, {name: _Run(tables={"events": events, "metrics": metrics}) for name in "ab"})
    assert table["cold"].tolist() == [True, False] and table["peak_memory_gib"].tolist() == [2.0, 2.0]
    row = table.iloc[0]
    assert row["money"] == pytest.approx(2.0) and row["queued_p50_s"] == pytest.approx(2.0)
    assert row["h_to_50"] == pytest.approx(2.0) and np.isinf(row["h_to_90"]) and row["answered"] == 1.0
