"""Files of a run for workers that do not see its directory: what goes, what comes back, what stays."""

import subprocess
import tempfile

import pytest
import torch
from fleet import tiny

from untether.clients.device.device import Shard
from untether.clients.hosting.carrier import Mirror, bring_home, digests, needed
from untether.clients.stores.adapter_store import AdapterStore
from untether.sim.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    made = RunDirectory.create(tmp_path / "run", tiny())
    store, state = AdapterStore(made.path, 1), {"a.weight": torch.ones(2, 2)}
    for round in (0, 1):
        for block, devices in {"first": ["d00000", "d00001"], "second": ["d00002"]}.items():
            store.save(round, block, {"local": dict.fromkeys(devices, state)})
    store.save(0, "tasks", {"shared": {"LaMP_2": state}})
    return made


def order(run):
    part = run.write_part("samples", 1, 1, "fetch-other", [{"sample_id": "x", "device_id": "d00002"}])
    return {"sample_parts": [part], "devices": [0]}


def test_a_call_takes_the_files_it_may_read_and_no_others(run):
    found = set(needed(run.path, (Shard(1, 1, (0,)), order(run))))
    adapters = {f"adapters/seed-1/round-{round}/local/first.safetensors" for round in (0, 1)}
    assert found == {"experiment.toml", *order(run)["sample_parts"], *adapters,
                     "adapters/seed-1/round-0/shared/tasks.safetensors"}  # fmt: skip
    assert set(needed(run.path, (1,))) == {"experiment.toml"}, "a call that is no shard"


def test_a_mirror_holds_what_is_needed_and_is_sent_nothing_twice(run):
    mirror, files = Mirror(), needed(run.path, (Shard(1, 1, (0,)), order(run)))
    assert set(mirror.lacking(digests(files))) == set(files)
    mirror.take(files)
    assert mirror.lacking(digests(files)) == []
    other = needed(run.path, (Shard(1, 1, (2,)), {}))
    changed = other | {"experiment.toml": b"name = 'other'"}
    assert set(mirror.lacking(digests(changed))) == changed.keys() - files.keys() | {"experiment.toml"}
    left = {str(path.relative_to(mirror.path)) for path in mirror.path.rglob("*") if path.is_file()}
    assert left == {"adapters/seed-1/round-0/shared/tasks.safetensors"}
    mirror.close()
    assert not mirror.path.exists()


def test_what_a_killed_worker_left_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = Mirror()
    for name in (f"untether-worker-{ended.pid}-x", "untether-worker-other"):
        (tmp_path / name).mkdir()
    second = Mirror()
    left = set(tmp_path.iterdir())
    assert left == {mine.path, second.path, tmp_path / "untether-worker-other"}


def test_what_a_worker_writes_and_deletes_is_done_at_home(run):
    mirror = Mirror()
    before = mirror.take(needed(run.path, (Shard(1, 1, (0,)), {})))
    there = RunDirectory.open(mirror.path)
    part = there.write_part("metrics", 1, 1, "learn-first", [{"device_id": "d00000", "value": 0.5}])
    (mirror.path / "state" / "answers.sqlite").write_bytes(b"its own")
    assert AdapterStore(there.path, 1).prune(1) == 1
    parcel = mirror.parcel({"columns": {}}, before)
    assert set(parcel.written) == {part} and parcel.deleted == ("adapters/seed-1/round-0/local/first.safetensors",)
    assert bring_home(run.path, parcel) == {"columns": {}}
    assert run.read_parts([part])["value"].tolist() == [0.5]
    kept = sorted(str(path.relative_to(run.path)) for path in run.path.glob("adapters/*/*/*/*"))
    assert kept == [f"adapters/seed-1/{name}.safetensors" for name in (
        "round-0/local/second", "round-0/shared/tasks", "round-1/local/first", "round-1/local/second")]  # fmt: skip
