"""Damage to what a run has on disk: made again where that is possible, else one sentence that names the file."""

from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from untether.clients.cloud.answer_cache import AnswerCache
from untether.clients.stores.adapter_store import AdapterStore
from untether.plugins import apart
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.run.directory import RunDirectory
from untether.sim.run.shared import SharedAdapters, SharedPart
from untether.sim.run.whole import plain_name, refuse_links

DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "junk": lambda path: path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def stopped(tmp_path):
    """A run of three rounds, stopped after the second."""
    experiment = Experiment.model_validate({"rounds": 3, "population": {"replay": True}})
    run = RunDirectory.create(tmp_path / "run", experiment)
    for round in (0, 1):
        rows = [{"device_id": "d00000", "metric": "accuracy", "value": float(row), "n": 1} for row in range(300)]
        part = run.write_part("metrics", experiment.seeds[0], round, "learn-0", rows)
        run.commit(experiment.seeds[0], round, {"metrics": [part]}, {"totals": {}}, carried={"round": round})
    run.check_state()
    return run


def test_a_run_that_was_killed_just_before_its_first_commit_goes_on(tmp_path, monkeypatch):
    """What the next round starts from is written before the commit that makes it count."""
    experiment = Experiment.model_validate({"rounds": 3})
    run = RunDirectory.create(tmp_path / "run", experiment)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "_commit_path", raises(KeyboardInterrupt))
        run.commit(experiment.seeds[0], 0, {}, {"totals": {}}, carried={"round": 0})
    assert list((run.path / "state" / "carried").iterdir())
    run.check_state()
    assert run.committed(experiment.seeds[0], 0) is None


def raises(error):
    def call(*_):
        raise error

    return call


FILES = (
    "state/commits/seed-{seed}-round-0.json", "state/commits/seed-{seed}-round-1.json",
    "state/carried/seed-{seed}-round-1.json", "state/parts/seed-{seed}/round-0/metrics/learn-0.parquet",
    "experiment.toml",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_run_does_not_go_on_from_a_damaged_file(stopped, name, damage):
    path = stopped.path / name.format(seed=stopped.experiment.seeds[0])
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
        RunDirectory.open(stopped.path).check_state()


def test_an_experiment_cut_at_the_end_of_a_line_is_not_filled_up_with_defaults(stopped):
    path = stopped.path / "experiment.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(UserError, match="not what the run began with"):
        stopped.check_state()


def test_a_number_that_changed_within_a_part_is_found(stopped):
    seed = stopped.experiment.seeds[0]
    path = stopped.path / f"state/parts/seed-{seed}/round-0/metrics/learn-0.parquet"
    whole = path.read_bytes()
    refused = 0
    for at in range(40, 200, 16):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            stopped.read_parts([str(path.relative_to(stopped.path))])
        except UserError as error:
            assert path.name in str(error)
            refused += 1
    assert refused >= 5  # the rest changes nothing that is read


def test_a_shard_whose_part_is_damaged_is_run_again(stopped):
    seed = stopped.experiment.seeds[0]
    part = stopped.write_part("metrics", seed, 2, "learn-0", [{"device_id": "d00000", "value": 1.0}])
    stopped.write_receipt(seed, 2, "learn-0", {"columns": {}, "parts": {"metrics": ["learn-0"]}})
    assert stopped.read_receipt(seed, 2, "learn-0")
    DAMAGES["cut"](stopped.path / part)
    assert stopped.read_receipt(seed, 2, "learn-0") is None
    receipt = stopped._receipt_path(seed, 2, "learn-0")
    receipt.write_text("[]")
    assert stopped.read_receipt(seed, 2, "learn-0") is None


def test_a_commit_cannot_name_a_file_elsewhere(stopped):
    path = stopped.path / f"state/commits/seed-{stopped.experiment.seeds[0]}-round-0.json"
    for name in ("/etc/hostname", "state/parts/../../../x.parquet", 5):
        path.write_text(json.dumps({"parts": {"metrics": [name]}, "facts": {}}))
        with pytest.raises(UserError, match="is no part of this run"):
            stopped.check_state()


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "gone"])
def test_a_damaged_adapter_is_an_error_that_names_its_file(tmp_path, damage):
    states = {f"d{row:05}": {"lora_A": np.full((2, 64), row, dtype=np.float32)} for row in range(3)}
    [name] = AdapterStore(tmp_path, 0).save(0, "block", {"local": states})
    path = AdapterStore(tmp_path, 0).root / name
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="block.safetensors"):
        AdapterStore(tmp_path, 0).load(0, "d00001", "local")


def test_a_weight_that_changed_within_an_adapter_is_found(tmp_path):
    states = {f"d{row:05}": {"lora_A": np.full((2, 64), row, dtype=np.float32)} for row in range(3)}
    store = AdapterStore(tmp_path, 0)
    [name] = store.save(0, "block", {"local": states})
    path = store.root / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"\x00\x00\x80\x3f" * 2)
    assert np.array_equal(store.load(0, "d00001", "local")["lora_A"], states["d00001"]["lora_A"])
    with pytest.raises(UserError, match="not the one that was written"):
        store.load(0, "d00002", "local")


def test_an_adapter_that_was_there_and_is_gone_is_an_error_and_not_a_new_beginning(tmp_path):
    store, state = AdapterStore(tmp_path, 0), {"lora_A": np.ones((2, 4), dtype=np.float32)}
    for round in (0, 1):
        store.save(round, "block", {"local": {"d00000": state}})
    (store.root / "round-1" / "local" / "block.safetensors").unlink()
    with pytest.raises(UserError, match=r"round-1/local/block\.safetensors: this file of the run is gone"):
        AdapterStore(tmp_path, 0).load(2, "d00000", "local")
    shutil.rmtree(store.root)
    with pytest.raises(UserError, match="is gone"):
        AdapterStore(tmp_path, 0).load(0, "d00000", "local")
    assert AdapterStore(tmp_path, 0).load(0, "d00000", "placebo") is None, "it never had one"


def test_what_one_name_keeps_is_not_missed_under_another(tmp_path):
    """The names of a first adapter and of shared ranks hold a dot."""
    store, state = AdapterStore(tmp_path, 0), {"lora_A": np.ones((2, 4), dtype=np.float32)}
    for block, kept in enumerate(("local", "local.first", "federated.4", "federated.8")):
        store.save(0, f"block-{block}", {kept: {"d00000": state}})
    for kept in ("local", "local.first", "federated.4", "federated.8"):
        assert AdapterStore(tmp_path, 0).load_exactly(0, "d00000", kept) is not None
    (store.root / "round-0" / "local.first" / "block-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"local\.first/block-1\.safetensors: this file of the run is gone"):
        AdapterStore(tmp_path, 0).load_exactly(0, "d00000", "local.first")


def test_an_adapter_that_was_pruned_is_not_missed(tmp_path):
    store, state = AdapterStore(tmp_path, 0), {"lora_A": np.ones((2, 4), dtype=np.float32)}
    for round in (0, 1):
        store.save(round, "block", {"local": {"d00000": state}})
    assert store.prune(1) == 1
    assert AdapterStore(tmp_path, 0).load_exactly(0, "d00000", "local") is None
    assert AdapterStore(tmp_path, 0).load(1, "d00000", "local") is not None


def second_half_zeroed(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


SHARED_DAMAGES = {**DAMAGES, "half zeroed": second_half_zeroed}


@pytest.mark.parametrize("damage", SHARED_DAMAGES)
def test_shared_adapters_that_are_damaged_are_trained_anew(stopped, damage):
    shared = SharedAdapters(stopped, 1)
    shared.write({"task/a": np.ones((8, 64), dtype=np.float32)}, {"a reason": 2})
    assert shared.there
    SHARED_DAMAGES[damage](shared.path)
    assert not shared.there and shared.arrays() == {} and shared.left_out() == {}


@pytest.mark.parametrize("damage", SHARED_DAMAGES)
def test_what_devices_share_is_not_read_from_a_damaged_file(stopped, damage):
    seed = stopped.experiment.seeds[0]
    part = SharedPart(stopped, seed, -1)
    part.begin({"a": np.ones((8, 64), dtype=np.float32)}, {"A": 512, "B": 0})
    stopped.commit(seed, 0, {}, part.write(0))
    assert SharedPart(stopped, seed, 0).whole == {"A": 512, "B": 0}
    [path] = stopped.path.glob("adapters/**/round-0.safetensors")
    SHARED_DAMAGES[damage](path)
    with pytest.raises(ResumableStop, match=r"round-0\.safetensors"):
        SharedPart(stopped, seed, 0)


@pytest.mark.parametrize("damage", ["cut", "zeroed", "junk"])
def test_a_runs_own_cache_is_set_aside_and_made_anew_and_anothers_is_left_alone(tmp_path, damage):
    path = tmp_path / "answers.sqlite"
    cache = AnswerCache(path)
    for key in range(400):
        cache.put(str(key), {"answer": "x" * 100})
    cache.close()
    DAMAGES[damage](path)
    with pytest.raises(UserError, match="answers.sqlite"):
        AnswerCache(path).several([str(key) for key in range(400)])
    anew = AnswerCache(path, own=True)
    assert len(anew) == 0 and (tmp_path / "answers.sqlite.damaged").exists()
    anew.close()


def test_a_value_that_is_none_of_ours_is_asked_for_again(tmp_path):
    cache = AnswerCache(tmp_path / "answers.sqlite")
    cache.put("a", {"answer": 1})
    cache.close()
    with sqlite3.connect(tmp_path / "answers.sqlite") as database:
        database.execute("UPDATE answers SET value = '[1'")
    assert AnswerCache(tmp_path / "answers.sqlite").several(["a", "b"]) == [None, None]


# --- a stranger's run directory ---------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run" / "tables").mkdir(parents=True)
    refuse_links(tmp_path / "run", ("tables", "report.html"))
    (tmp_path / "run" / "tables" / "predictions").symlink_to(elsewhere)
    with pytest.raises(UserError, match="predictions is a link"):
        refuse_links(tmp_path / "run", ("tables", "report.html"))


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".x", None, "x\x1b[2J", "a b"])
def test_a_name_that_becomes_a_file_is_plain(tmp_path, name):
    with pytest.raises(UserError, match="is no name that untether gives"):
        plain_name(name, "the task", tmp_path / "predictions.parquet")
    assert plain_name("LaMP_2N", "the task", tmp_path) == "LaMP_2N"


@pytest.mark.parametrize("name", ["mine.py", "../mine.py", "~/mine.py", "{run}/mine.py", "{run}/../run/mine.py"])
def test_code_that_came_with_a_run_directory_is_not_run_by_looking_at_it(stopped, name):
    (stopped.path / "mine.py").write_text("raise SystemExit('this ran')")
    (stopped.path.parent / "mine.py").write_text("raise SystemExit('this ran')")
    file = stopped.path / "experiment.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("plugins")]
    file.write_text("\n".join([f'plugins = ["{name.format(run=stopped.path)}"]', *lines]))
    with pytest.raises(UserError, match="code that came with the run directory"):
        _ = RunDirectory.open(stopped.path).experiment


def test_a_plug_in_of_ones_own_is_run_where_it_lies(stopped):
    mine = stopped.path.parent / "own.py"
    mine.write_text("from untether.plugins import register\nregister('policy', 'own', len)\n")
    file = stopped.path / "experiment.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("plugins")]
    file.write_text("\n".join([f'plugins = ["{mine}"]', *lines]))
    with apart():
        assert RunDirectory.open(stopped.path).experiment.plugins == (str(mine),)


def table(path, **columns):
    pq.write_table(pa.table({"arm": ["local"], "metric": ["mae"], "value": [1.0], **columns}), path)


@pytest.mark.parametrize(("columns", "said"), [
    ({"value": ["much"]}, "of another kind than untether writes"), ({"value": [float("nan")]}, "no number"),
    ({"value": [None]}, "no number"), ({"value": [float("inf")]}, "no number"),
])  # fmt: skip
def test_a_score_that_is_no_number_is_not_read_as_zero(stopped, columns, said):
    table(stopped.path / "metrics.parquet")
    assert stopped.read("metrics")["value"].tolist() == [1.0]
    table(stopped.path / "metrics.parquet", **columns)
    with pytest.raises(UserError, match=rf"metrics\.parquet.*{said}"):
        stopped.read("metrics")


@pytest.mark.parametrize(("devices", "versions"), [("5", "null"), ('["d00000"]', "5"), ('["d00000"]', "[]")])
def test_an_adapters_file_that_says_nonsense_of_itself_is_damaged(tmp_path, devices, versions):
    store = AdapterStore(tmp_path, 0)
    path = store.root / "round-0" / "local" / "block.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"a": np.ones((1, 2), np.float32)}, path, metadata={"devices": devices, "versions": versions})
    with pytest.raises(UserError, match=r"block\.safetensors: this file of the run is damaged"):
        store.load(0, "d00000", "local")
