"""Measures the profile `this-machine`: how fast this computer really trains and reads memory, in a few seconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F

from clients.gemm import fast_products
from sim.clock import WallClock
from sim.hardware import THIS_MACHINE, Profile

Timer = Callable[[], float]
_WALL: Timer = WallClock().now_s

ROWS, HIDDEN, INTERMEDIATE = 256, 576, 1536
"""A step of 4 rows of 64 tokens, at the width of a 135M-parameter model."""

LAYERS = 16
"""Layers whose weights are read: 256 MB."""

WHOLE_STEP = 0.8
"""Share of that rate that a whole step reaches: attention, adapters and optimizer are not linear maps."""

WHOLE_TOKEN = 0.8
"""Share of the rate of single-row products that decoding reaches: norms, attention and cache take the rest."""


def measure(repeats: int = 8, now: Timer = _WALL) -> Profile:
    """The best of `repeats` timings, by `now`, of what training and decoding do most: the linear maps of a frozen
    layer, forward and backward, on a step's rows; and the linear maps of a model on a single row.

    Power, battery and storage figures are what the system tells, or estimates: their sources say which.
    """
    flops = training_flops_per_s(repeats, now=now)
    memory = decoding_bytes_per_s(repeats, now)
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    values = {
        "ram_gib": (psutil.virtual_memory().total / 2**30, "measured"),
        "usable_ram": (0.8, "estimate"),
        "compute_gflops": (flops / 1e9, "measured: linear maps of a frozen layer, forward and backward"),
        "training_share": (WHOLE_STEP, "estimate: from a few whole steps of a 135M-parameter model"),
        "memory_gb_per_s": (memory / 1e9, "measured: weights that products with a single row read"),
        "decoding_share": (WHOLE_TOKEN, "estimate: from decoding with a 135M-parameter model"),
        "hot_share": (1.0, "estimate: measured while warm"),
        "heating_s": (300.0, "estimate: of no effect"),
        "load_w": (65.0, "estimate"),
        "idle_w": (15.0, "estimate"),
        "radio_w": (1.0, "estimate"),
        "battery_wh": (0.0 if battery is None else 50.0, "estimate: none found" if battery is None else "estimate"),
        "charge_w": (0.0 if battery is None else 45.0, "estimate"),
        "storage_gb": (shutil.disk_usage(os.getcwd()).total / 1e9, "measured"),
    }
    return Profile(
        name=THIS_MACHINE, title="this machine", kind="computer", **{key: value for key, (value, _) in values.items()},
        sources={key: source for key, (_, source) in values.items()},
    )


def training_flops_per_s(repeats: int = 8, dtype: torch.dtype = torch.float32, now: Timer = _WALL) -> float:
    """Operations a second of a gated MLP and an attention block's maps with frozen weights: 4 a weight and row."""
    generator = torch.Generator().manual_seed(0)
    up, down, qkv, out = _layer(generator, dtype)
    start = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)

    def step() -> None:
        x = start
        for _ in range(4):
            q, k, v = F.linear(F.rms_norm(x, (HIDDEN,)), qkv).chunk(3, -1)
            x = x + F.linear(q * torch.sigmoid(k) * v, out)
            gate, value = F.linear(F.rms_norm(x, (HIDDEN,)), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        x.square().mean().backward()

    flops = 4 * 4 * ROWS * sum(weight.numel() for weight in (up, down, qkv, out))
    with fast_products():  # as the engine multiplies
        return flops / _best_s(step, repeats, now)


def decoding_bytes_per_s(repeats: int = 8, now: Timer = _WALL) -> float:
    """Bytes of weights a second that products with a single row read, of more layers than the caches hold."""
    generator = torch.Generator().manual_seed(0)
    layers = [_layer(generator, torch.float32) for _ in range(LAYERS)]
    x, y = torch.randn(1, 1, HIDDEN, generator=generator), torch.randn(1, 1, INTERMEDIATE, generator=generator)

    def step() -> None:
        for up, down, qkv, out in layers:
            for row, weight in ((x, qkv), (x, out), (x, up), (y, down)):
                F.linear(row, weight)

    read = 4 * LAYERS * sum(weight.numel() for weight in layers[0])
    with torch.inference_mode(), fast_products():
        return read / _best_s(step, repeats, now)


def _layer(generator: torch.Generator, dtype: torch.dtype) -> list[torch.Tensor]:
    """The linear maps of one layer, joined as the engine joins them: gate and up, down, qkv, out."""
    shapes = [(HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN), (HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN)]
    return [torch.randn(b, a, generator=generator, dtype=dtype) / a**0.5 for a, b in shapes]


def _best_s(step: Callable[[], object], repeats: int, now: Timer = _WALL) -> float:
    step()
    times = []
    for _ in range(repeats):
        begun = now()
        step()
        times.append(now() - begun)
    return min(times)
