"""Measures the profile `this-machine`: how fast this computer really trains and decodes, in a few seconds.

Two rates are those of matrix products alone: many rows (training) and a single one (decoding). What share of them whole
steps and whole answers reach is measured too, with the engine itself on a small model, which also spends time on norms,
attention, adapters, optimizer and the calls between them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import torch
import torch.nn.functional as F
import transformers

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.generation import GenerationRow, generate
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.engine.kernels.gemm import fast_products
from untether.clients.engine.training import train
from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.experiment.sections import Lora
from untether.sim.time.cost import CostModel, ModelShape
from untether.sim.time.hardware import THIS_MACHINE, Profile

Timer = Callable[[], float]
_WALL: Timer = WallClock().now_s

ROWS, HIDDEN, INTERMEDIATE = 256, 576, 1536
"""A step of 4 rows of 64 tokens, at the width of a 135M-parameter model."""

LAYERS = 16
"""Layers whose weights are read: 256 MB."""

SMALL = ModelShape(12, HIDDEN, INTERMEDIATE, 9, 3, 64, 8192)
"""A model whose weights (190 MB) no cache holds, small enough to be trained a few steps and asked within seconds."""

LORA = Lora()


def measure(repeats: int = 8, now: Timer = _WALL) -> Profile:
    """Measures the profile of this machine.

    It is the best of `repeats` timings, by `now`, of the main work of training and decoding: the linear maps of a
    frozen layer, forward and backward, on a step's rows; the linear maps of many layers on a single row; and whole
    steps and answers of a small model. Power, battery and storage figures are what the system reports, or estimates:
    their sources say which.
    """
    with _own_threads():
        return _measured(repeats, now)


@contextmanager
def _own_threads() -> Iterator[None]:
    """No more threads than cores that are ours: torch counts those of a quota's whole machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, limits.cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(repeats: int, now: Timer) -> Profile:
    flops = training_flops_per_s(repeats, now=now)
    memory = decoding_bytes_per_s(repeats, now)
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    values = {
        "ram_gib": (limits.memory_bytes() / 2**30, "measured"),
        "usable_ram": (0.8, "estimate"),
        "compute_gflops": (flops / 1e9, "measured: linear maps of a frozen layer, forward and backward"),
        "training_share": (1.0, "measured: whole steps of a small model"),
        "memory_gb_per_s": (memory / 1e9, "measured: weights that products with a single row read"),
        "decoding_share": (1.0, "measured: whole answers of a small model"),
        "hot_share": (1.0, "estimate: measured while warm"),
        "heating_s": (300.0, "estimate: of no effect"),
        "load_w": (65.0, "estimate"),
        "idle_w": (15.0, "estimate"),
        "radio_w": (1.0, "estimate"),
        "battery_wh": (0.0 if battery is None else 50.0, "estimate: none found" if battery is None else "estimate"),
        "charge_w": (0.0 if battery is None else 45.0, "estimate"),
        "storage_gb": (shutil.disk_usage(os.getcwd()).total / 1e9, "measured"),
    }
    profile = Profile(  # products say all of prompts and tokens: nothing is fixed beside them
        name=THIS_MACHINE, title="this machine", kind="computer", layer_us=0.0, prefill_share=1.0, **{
            key: value for key, (value, _) in values.items()
        }, sources={key: source for key, (_, source) in values.items()},
    )
    training, decoding = _shares(profile, max(2, repeats // 2), now)
    return replace(profile, training_share=training, decoding_share=decoding, prefill_share=training)


def _shares(products: Profile, repeats: int, now: Timer) -> tuple[float, float]:
    """What whole steps, and whole tokens of an answer, reach of the rates of products alone."""
    base = random_base(SMALL)
    stack = AdapterStack.create(base, [LoraSpec.of(LORA)], [1])
    cost = CostModel(products, SMALL, 32, LORA)
    rows, tokens, new = 4, 64, 9
    step = min(step_s(base, rows, tokens, now) for _ in range(repeats))
    whole, first = (min(answer_s(base, stack, tokens, n, now) for _ in range(repeats)) for n in (new, 1))
    expected = cost.decoding_s(tokens, new) - cost.decoding_s(tokens, 1)
    return (
        min(1.0, cost.training_s(rows * tokens, rows * (tokens // 4), tokens) / step),
        min(1.0, expected / max(whole - first, 1e-9)),
    )


def random_base(shape: ModelShape) -> FrozenBase:
    """Returns a frozen Llama of this shape with random weights, which never ends an answer."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FrozenBase(transformers.LlamaForCausalLM(config))


def step_s(base: FrozenBase, rows: int, tokens: int, now: Timer = _WALL) -> float:
    """Returns the seconds of the faster of two optimizer steps.

    Args:
        base: The model.
        rows: Examples.
        tokens: Of an example, a quarter of them targets.
        now: The clock.
    """
    prompt = tokens + 1 - tokens // 4
    ids = [[3 + (7 * row + place) % 1000 for place in range(tokens + 1)] for row in range(rows)]
    job = TrainJob(
        key=0, examples=[Example(row[:prompt], row[prompt:]) for row in ids],
        settings=TrainSettings(steps=2, batch_size=rows), spec=LoraSpec.of(LORA), seed=1, init_seed=1,
    )  # fmt: skip
    times = [now()]
    train(base, [job], progress=lambda done, total: times.append(now()))
    return min(after - before for before, after in zip(times, times[1:], strict=False))


def answer_s(base: FrozenBase, stack: AdapterStack, prompt: int, new: int, now: Timer = _WALL) -> float:
    """Returns the seconds to answer one query of `prompt` tokens with `new` ones, by its adapter."""
    row = GenerationRow([3 + place % 1000 for place in range(prompt)], 0)
    begun = now()
    generate(base, stack, [row], max_new_tokens=new)
    return now() - begun


def training_flops_per_s(repeats: int = 8, dtype: torch.dtype = torch.float32, now: Timer = _WALL) -> float:
    """Returns operations a second of a gated MLP and an attention block's maps with frozen weights: 4 a weight and row.
    """
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
    """Returns bytes of weights a second that products with a single row read, of more layers than the caches hold."""
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
