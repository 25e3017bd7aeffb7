"""Adapters on disk: the latest round's is loaded, and what is superseded, and only that, goes."""

import resource
import signal

import pytest
import torch

from untether.clients.stores import adapter_store
from untether.clients.stores.adapter_store import AdapterStore, adapter_version
from untether.sim.core.errors import ResumableStop, UserError


def _state(value):
    return {"layer.lora_A.weight": torch.full((2, 3), float(value)), "layer.lora_B.weight": torch.full((3, 2), -1.0)}


def _value(store, round, device, arm="local"):
    state = store.load(round, device, arm)
    return None if state is None else state["layer.lora_A.weight"][0, 0].item()


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path, 1)


def _files(store):
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*.safetensors"))


def test_a_device_has_the_adapter_of_its_latest_round(store):
    store.save(0, "a", {"local": {"d0": _state(0), "d1": _state(1)}, "placebo": {"d0": _state(5)}})
    store.save(2, "a", {"local": {"d1": _state(21)}})
    assert [_value(store, round, "d1") for round in range(4)] == [1, 1, 21, 21]
    assert _value(store, 3, "d0") == 0 and _value(store, 3, "d0", "placebo") == 5
    assert store.load(3, "d9", "local") is None and store.devices(0, "local") == ["d0", "d1"]


def test_superseded_rounds_go_and_nothing_else(store):
    store.save(0, "a", {"local": {"d0": _state(0), "d1": _state(1)}, "placebo": {"d0": _state(5)}})
    store.save(0, "b", {"local": {"d2": _state(2)}})
    store.save(1, "a", {"local": {"d0": _state(10), "d1": _state(11)}})
    store.save(2, "a", {"local": {"d0": _state(20)}})
    assert store.prune(0) == 0
    assert store.prune(1) == 1, "round 0 of d0 and d1"
    assert store.prune(2) == 0, "d1 still wears that of round 1"
    assert [_value(store, 2, device) for device in ("d0", "d1", "d2")] == [20, 11, 2]
    assert _value(store, 2, "d0", "placebo") == 5
    assert _value(AdapterStore(store.root.parents[1], 1), 2, "d1") == 11


def test_a_run_of_many_rounds_keeps_two(store):
    for round in range(20):
        store.prune(round - 1)
        store.save(round, "a", {"local": {"d0": _state(round)}})
    assert _files(store) == ["round-18/local/a.safetensors", "round-19/local/a.safetensors"]
    assert [path.name for path in sorted(store.root.iterdir())] == ["round-18", "round-19"]


def test_what_another_worker_prunes_meanwhile_is_gone_and_no_error(store, monkeypatch):
    for round in range(3):
        store.save(round, "a", {"local": {"d0": _state(round)}})
    opened = adapter_store.safe_open

    def late(path, framework):
        if "round-0" in str(path):
            path.unlink()
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")
        return opened(path, framework=framework)

    monkeypatch.setattr(adapter_store, "safe_open", late)
    assert store.prune(2) == 1 and _value(store, 2, "d0") == 2
    (store.root / "round-2" / "local" / "a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="a.safetensors"):
        AdapterStore(store.root.parents[1], 1).load(2, "d0", "local")


def test_rounds_that_another_worker_prunes_meanwhile_are_gone_and_no_error(store, monkeypatch):
    for round in range(3):
        store.save(round, "a", {"local": {"d0": _state(round)}})
    monkeypatch.setattr(store, "_rounds", lambda: [0, 1, 2])  # as seen before the other one pruned
    other = AdapterStore(store.root.parents[1], 1)
    assert other.prune(2) == 2 and store.prune(2) == 0
    assert _files(store) == ["round-2/local/a.safetensors"]


def test_equal_adapters_have_equal_versions():
    assert adapter_version(_state(1)) == adapter_version(dict(reversed(_state(1).items())))
    assert adapter_version(_state(1)) != adapter_version(_state(2))


def test_a_full_disk_is_a_resumable_stop_and_leaves_nothing_behind(store):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(ResumableStop, match="cannot write .*then resume the run"):
            store.save(0, "a", {"local": {"d0": _state(0)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(store.root.rglob("*.safetensors")) and not list(store.root.rglob("*.tmp"))
