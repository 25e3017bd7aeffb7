"""The rate of dense products on this machine, in the dtype and the shapes that training uses: what 100% would be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench.measure import synchronize
from untether.clients.engine.kernels.gemm import fast_products


def rates(
    shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: str = "cpu", seconds: float = 0.3
) -> dict[str, float]:
    """FLOP/s of x @ W.T and of its input gradient over all (in, out) shapes with so many rows.

    `plain` is PyTorch as it comes, `fast` with `clients.engine.kernels.gemm.fast_products`. By `clock(device)`.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    work = [(draw(rows, i), draw(o, i)) for i, o in shapes]
    grads = [draw(rows, o) for _, o in shapes]
    flops = 4 * rows * sum(i * o for i, o in shapes)

    def once() -> None:
        for (x, weight), grad in zip(work, grads, strict=True):
            F.linear(x, weight)
            F.linear(grad, weight.t())

    found = {"plain": flops / _seconds(once, device, seconds)}
    with fast_products():
        found["fast"] = flops / _seconds(once, device, seconds)
    return found


def clock(device: str) -> Callable[[], float]:
    """CPU seconds of one thread; of a GPU, wall seconds up to the end of its work."""

    def wall() -> float:
        synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else wall


def _seconds(work: Callable[[], None], device: str, seconds: float) -> float:
    now, times = clock(device), 1 if device == "cpu" else 20  # waiting for a GPU takes longer than a product
    work()
    best, start = float("inf"), now()
    while now() - start < seconds:
        before = now()
        for _ in range(times):
            work()
        best = min(best, (now() - before) / times)
    return best


def shapes_of(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(in, out) of every linear layer of a decoder's blocks."""
    return [
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]


def training_flops(model: torch.nn.Module, rank: int, rows: Sequence[tuple[int, int]], lean: bool = True) -> float:
    """FLOPs that one step has to do, of rows given as (tokens, targets), with adapters of a rank on every linear layer.

    Frozen products forward and backward (2 + 2 a weight and token); the last block's output and MLP, and the head, on
    target tokens only; causal attention, half of the square, forward and backward; adapters, forward and
    both gradients.
    """
    config = model.config
    layers, hidden = config.num_hidden_layers, config.hidden_size
    tokens, targets = sum(t for t, _ in rows), sum(t for _, t in rows)
    total = 4.0 * targets * hidden * config.vocab_size
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "lm_head" in name:
            continue
        last = f".{layers - 1}." in name and not any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        seen = targets if last else tokens
        total += seen * (4.0 * module.weight.numel() + 6.0 * rank * (module.in_features + module.out_features))
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    total += sum(12.0 * t * t / 2 * width * layers for t, _ in rows)
    return total
