"""The measured profile: every figure is there, and says something about a machine that works."""

from __future__ import annotations

import time

import torch

from untether.sim.launch import this_machine
from untether.sim.launch.this_machine import measure
from untether.sim.time.cost import CostModel, ModelShape
from untether.sim.time.hardware import FIGURES, THIS_MACHINE


def test_this_machine_is_measured(monkeypatch):
    """With a smaller model and fewer layers than a run takes."""
    monkeypatch.setattr(this_machine, "LAYERS", 2)
    monkeypatch.setattr(this_machine, "SMALL", ModelShape(2, 64, 128, 4, 2, 16, 1000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take minutes on a busy machine
    try:
        profile = measure(repeats=1, now=time.process_time)
    finally:
        torch.set_num_threads(threads)
    assert profile.name == THIS_MACHINE and set(profile.sources) == set(FIGURES)
    assert profile.compute_gflops > 0.1 and profile.memory_gb_per_s > 0.1
    assert 0 < profile.training_share <= 1 and 0 < profile.decoding_share <= 1
    cost = CostModel(profile, this_machine.SMALL, 32)
    assert 0 < cost.training_s(256) < 60 and 0 < cost.decoding_s(64, 8) < 60
