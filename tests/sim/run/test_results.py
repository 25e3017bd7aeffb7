"""The run directory: what is staged does not count, what is committed does, and a table is the same however split."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from untether.clients.stores.adapter_store import AdapterStore
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.run.directory import RunDirectory
from untether.sim.run.lock import RunLock
from untether.sim.run.shared import SharedAdapters
from untether.sim.run.tables import SCHEMA_VERSION, TABLES


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


def test_a_run_of_another_experiment_is_refused_with_what_differs(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    run.check_resumable()
    run.check_resumable(experiment)
    other = Experiment(seeds=(3, 4), rounds=2, lora={"rank": 4})
    with pytest.raises(UserError) as refused:
        run.check_resumable(other)
    assert "lora.rank: 8 there, 4 here" in str(refused.value)
    assert "seeds: [3] there, [3, 4] here" in str(refused.value)
    assert "rounds" not in str(refused.value)


def test_what_only_changes_the_speed_may_differ(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    run.check_resumable(Experiment(seeds=(3,), rounds=2, engine={"workers": 1, "shard": 8}))


def test_a_run_of_another_version_is_refused_with_both(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    here = run.read_json("state/versions.json")
    run.write_json("state/versions.json", {**here, "untether": "0.0.7"})
    with pytest.raises(UserError, match=f"untether 0.0.7 there, {here['untether']} here"):
        run.check_resumable()
    (run.path / "state" / "versions.json").unlink()
    with pytest.raises(UserError, match=f"schema_version unknown there, {SCHEMA_VERSION} here"):
        run.check_resumable()


def test_a_second_coordinator_is_refused_while_the_first_lives(tmp_path, experiment):
    run = RunDirectory.create(tmp_path / "run", experiment)
    with RunLock(run.path), pytest.raises(UserError, match=f"in use by another run .process {os.getpid()} on"):
        RunLock(run.path).__enter__()
    with RunLock(run.path):
        pass


def test_a_disk_that_is_full_stops_the_run_resumably(tmp_path, experiment):
    """The real write path under the kernel's own limit on the size of files."""
    code = f"""
import resource, signal, sys
from untether.sim.core.errors import ResumableStop
from untether.sim.run.directory import RunDirectory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = RunDirectory.open({str(tmp_path / "run")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for write in (lambda: run.write_part("metrics", 3, 0, "b", [{{"device_id": "d"}}]),
              lambda: run.write_receipt(3, 0, "a", {{"parts": {{}}, "columns": {{"device": list(range(99))}}}}),
              lambda: run.merge(run.experiment),
              lambda: run.commit(3, 1, {{"metrics": ["x" * 200]}}, {{}})):
    try:
        write()
    except ResumableStop as stop:
        assert "cannot write" in str(stop) and "Free some space, then resume" in str(stop), stop
    else:
        sys.exit("it wrote")
"""
    run = RunDirectory.create(tmp_path / "run", experiment)
    run.commit(3, 0, {"metrics": [run.write_part("metrics", 3, 0, "a", [_metric("d00000", 0.5)])]}, {})
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run.committed(3, 1) is None and not list(run.path.rglob(".*.tmp"))
    run.merge(experiment)
    assert run.read("metrics")["value"].tolist() == [0.5]


def test_what_a_commit_names_is_on_the_disk_before_it(tmp_path, experiment, monkeypatch):
    """Files and the names of files and folders, parts and adapters alike."""
    done, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(number):
        done.append(os.readlink(f"/proc/self/fd/{number}"))
        return real_fsync(number)

    def replace(source, target):
        assert str(source) in done, f"{target} got its name before its content was on the disk"
        done.append(f"named {target}")
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run = RunDirectory.create(tmp_path / "run", experiment)
    part = run.write_part("metrics", 3, 0, "a", [_metric("d00000", 0.5)])
    AdapterStore(run.path, 3).save(0, "block", {"local": {"d00000": {"a": torch.zeros(2)}}})
    run.commit(3, 0, {"metrics": [part]}, {})
    (commit,) = [place for place, what in enumerate(done) if what.startswith("named") and "commits" in what]
    adapter = run.path / "adapters/seed-3/round-0/local/block.safetensors"
    for path in (run.path / part, adapter):
        named = done.index(f"named {path}")
        assert str(path.parent) in done[named:commit], "its name is on the disk as well"
        for folder in path.relative_to(run.path).parents:
            above = (run.path / folder).parent
            assert str(above) in done[:commit], f"{folder} is a name in {above}"


def test_shared_adapters_come_back_and_a_disk_that_takes_none_is_a_stop(tmp_path, experiment):
    shared = SharedAdapters(RunDirectory.create(tmp_path / "run", experiment), 3)
    assert not shared.there and shared.arrays() == {} and shared.left_out() == {}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    shared.write({"LaMP_4/a.weight": array.T}, {"reason": 2})
    assert shared.there and shared.left_out() == {"reason": 2}
    np.testing.assert_array_equal(shared.arrays()["LaMP_4/a.weight"], array.T)
    (tmp_path / "run" / "adapters" / "seed-4").write_text("a file where a folder should be")
    with pytest.raises(ResumableStop, match=r"cannot write .*shared\.safetensors"):
        SharedAdapters(RunDirectory(tmp_path / "run"), 4).write({"a": array}, {})


@pytest.mark.parametrize("rows", [0, 1, 3, 6, 7, 20])
def test_rows_are_written_as_they_come_whatever_their_number(tmp_path, experiment, monkeypatch, rows):
    """In batches of three, two of them together; and a frame that may not be changed holds what others do."""
    monkeypatch.setattr("untether.sim.run.tables.BATCH_ROWS", 3)
    monkeypatch.setattr("untether.sim.run.tables.GROUP_ROWS", 6)
    run = RunDirectory.create(tmp_path / "run", experiment)
    seed = experiment.seeds[0]
    part = run.write_part("metrics", seed, 0, "a", (_metric(f"d{number:05d}", number / 8) for number in range(rows)))
    run.commit(seed, 0, {"metrics": [part]}, {})
    run.merge(experiment)
    frame = run.read("metrics")
    assert list(frame["value"]) == [number / 8 for number in range(rows)] and set(frame["seed"]) <= {seed}
    pd.testing.assert_frame_equal(frame, run.read("metrics", fixed=True))
