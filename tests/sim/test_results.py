"""The run directory: what is staged does not count, what is committed does, and a table is the same however split."""

import json

import pyarrow.parquet as pq
import pytest

from sim.errors import UserError
from sim.experiment import Experiment
from sim.results import SCHEMA_VERSION, TABLES, RunDirectory


def _metric(device, value):
    return {"time_s": 0.0, "device_id": device, "user_id": f"u{device}", "arm": "local", "task": "LaMP_4",
            "metric": "rouge1", "value": value, "n": 2}  # fmt: skip


@pytest.fixture
def experiment():
    return Experiment(seeds=(3,), rounds=2)


def test_only_committed_rounds_reach_the_tables(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    kept = run.write_part("metrics", 3, 0, "a", [_metric("d00000", 0.5)])
    run.write_part("metrics", 3, 0, "abandoned", [_metric("d00001", 9.0)])
    run.write_part("metrics", 3, 1, "a", [_metric("d00000", 9.0)])
    run.commit(3, 0, {"metrics": [kept]}, {})
    assert run.committed(3, 0)["parts"] == {"metrics": [kept]}
    assert run.committed(3, 1) is None
    run.merge(experiment)
    frame = run.read("metrics")
    assert frame["value"].tolist() == [0.5]
    assert (frame["seed"].tolist(), frame["round"].tolist()) == ([3], [0])


def test_tables_do_not_depend_on_how_shards_were_cut(tmp_path, experiment):
    rows = [_metric(f"d{index:05d}", index / 7) for index in range(9)]
    written = []
    for name, cuts in (("one", [rows]), ("three", [rows[6:], rows[:2], rows[2:6]])):
        run = RunDirectory.create(tmp_path / name, experiment)
        parts = [run.write_part("metrics", 3, 0, str(number), cut) for number, cut in enumerate(cuts)]
        run.commit(3, 0, {"metrics": parts}, {})
        run.merge(experiment)
        written.append(run.read("metrics"))
    assert written[0].equals(written[1])


def test_every_table_exists_with_its_schema_version(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    run.merge(experiment)
    for table, schema in TABLES.items():
        found = pq.read_schema(run.path / f"{table}.parquet")
        assert found.names == schema.names
        assert found.metadata[b"schema_version"] == SCHEMA_VERSION.encode()
        assert "seed" in found.names


def test_truth_joins_samples_by_text(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    common = {"device_id": "d", "task": "LaMP_4", "output": "o", "verdict": "accepted"}
    rows = [{**common, "sample_id": str(n), "input": f"i{n}"} for n in range(2)]
    run.commit(3, 0, {"samples": [run.write_part("samples", 3, 0, "a", rows)]}, {})
    run.merge(experiment, {("LaMP_4", "i1", "o"): "hallucination"})
    assert run.read("samples")["truth"].tolist()[1] == "hallucination"
    assert run.read("samples")["truth"].isna().tolist() == [True, False]


def test_a_directory_with_a_run_is_not_overwritten(tmp_path, experiment):
    RunDirectory.create(tmp_path / "run", experiment)
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        RunDirectory.create(tmp_path / "run", experiment)
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(tmp_path)
    assert RunDirectory.open(tmp_path / "run").experiment == experiment


def test_a_broken_write_leaves_the_old_file(tmp_path, experiment, monkeypatch):
    run = RunDirectory.create(tmp_path / "run", experiment)
    run.write_json("summary.json", {"rows": []})
    with pytest.raises(ValueError):
        run.write_json("summary.json", {"rows": [float("nan")]})
    assert json.loads((run.path / "summary.json").read_text()) == {"rows": []}
