"""The workers of a machine share its memory."""

import sys
from types import SimpleNamespace

import pytest
import torch

from untether.clients.engine import memory

CPU, GIB = torch.device("cpu"), 2**30


def _ray(here, nodes, initialized=True):
    return SimpleNamespace(
        is_initialized=lambda: initialized,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: here),
        nodes=lambda: [{"NodeID": name, "Resources": resources} for name, resources in nodes.items()],
    )


@pytest.fixture
def machine(monkeypatch):
    """A machine with 12 GiB free, in a cluster where the three nodes offer 3, 1 and no workers."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 12 * GIB)

    def at(here, initialized=True):
        nodes = {"large": {"CPU": 4.0, "worker": 3.0}, "small": {"worker": 1.0}, "head": {"CPU": 2.0}}
        monkeypatch.setitem(sys.modules, "ray", _ray(here, nodes, initialized))

    return at


@pytest.mark.parametrize(("here", "gib"), [("large", 2), ("small", 6), ("head", 6)])
def test_a_worker_takes_its_part_of_half_of_what_is_free_on_its_own_node(machine, here, gib):
    machine(here)
    assert memory.budget_bytes(None, CPU) == gib * GIB


def test_a_budget_asked_for_is_the_workers_own(machine):
    machine("large")
    assert memory.budget_bytes(5 * GIB, CPU) == 5 * GIB


def test_without_ray_there_is_one_worker(machine):
    machine("large", initialized=False)
    assert memory.budget_bytes(None, CPU) == 6 * GIB
