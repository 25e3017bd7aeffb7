"""Dense products at the rate that the processor has: exact ones in float32, and `mixed` ones with weights in bfloat16.

PyTorch's float32 products on a CPU use MKL, which on AMD processors runs at less than half the rate of oneDNN, the
other library that PyTorch carries: 105 against 240 GFLOP/s on one core of an EPYC with AVX-512, and 60 against 150 for
the thin batched products of adapters. PyTorch hands float32 products to oneDNN where `fp32_precision` allows bfloat16
inside. oneDNN uses that permission only where the processor has matrix tiles (AMX): everywhere else the products stay
float32, as exact as MKL's. So the permission is given where there are no tiles, and only after a test that the products
really are exact.

Where a processor multiplies in bfloat16, weights in bfloat16 are 1.8 times as fast again, and rounded
(`frozen_linear`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MIXED = "mixed"
"""A base whose layers multiply in bfloat16, and all else is float32."""

_WORTHWHILE = 7 / 6


@contextmanager
def fast_products() -> Iterator[None]:
    """Makes float32 products on the CPU use the faster of the exact libraries while the context is open."""
    with _products("bf16" if onednn_is_exact() else None):
        yield


@contextmanager
def plain_products() -> Iterator[None]:
    """Makes products use MKL again while the context is open.

    Many small products of ever new shapes (attention) run there as fast, and oneDNN would compile each shape first, in
    half a millisecond. Products of a few rows run there faster.
    """
    with _products("ieee" if onednn_is_exact() else None):
        yield


@contextmanager
def _products(precision: str | None) -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision or before
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def accelerate(module: torch.nn.Module) -> None:
    """Makes a module's forward pass (an encoder's, say) run under `fast_products` from now on."""
    plain = module.forward

    def forward(*args, **kwargs):
        with fast_products():
            return plain(*args, **kwargs)

    module.forward = forward


@cache
def onednn_is_exact() -> bool:
    """Returns whether oneDNN is there and keeps float32 products exact on this processor."""
    if not torch.backends.mkldnn.is_available() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():
        return False
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4, 256, 192, generator=draw)
    b = torch.randn(4, 192, 160, generator=draw)
    exact = a.double() @ b.double()

    def error() -> float:
        whole = (torch.bmm(a, b) - exact).abs().max()
        return max(whole, (torch.nn.functional.linear(a[0], b[0].t()) - exact[0]).abs().max()).item()

    plain = error()
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        return error() < 4 * plain
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x @ weight.T + bias in x's dtype; the product alone is in the weight's, where that is narrower.

    So it is with `dtype = "mixed"`: where the processor has products of bfloat16, float32 activations are rounded on
    the way in and the sums on the way out, which costs less than the product saves.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    return frozen_linears(x, [weight], [bias])[0]


def frozen_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Returns `frozen_linear` of several layers that share their input, which is rounded once."""
    narrow = x.to(weights[0].dtype)
    if narrow is x:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    outputs = (F.linear(narrow, weight).to(x.dtype) for weight in weights)
    return tuple(y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True))


@cache
def bfloat16_gain() -> float:
    """Returns how many times faster this processor's products are with weights in bfloat16 than in float32: of layers
    as those of a small language model, as `frozen_linear` takes them.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 576, generator=draw)
    weights = [torch.randn(1536, 576, generator=draw), torch.randn(576, 1536, generator=draw)]
    narrow = [weight.to(torch.bfloat16) for weight in weights]

    def seconds(up: Tensor, down: Tensor) -> float:
        begun = time.thread_time()
        frozen_linear(frozen_linear(x, up), down)
        return time.thread_time() - begun

    with torch.inference_mode(), fast_products():
        pairs = [(seconds(*weights), seconds(*narrow)) for _ in range(9)]  # by turns: a machine's pace changes
    return min(wide for wide, _ in pairs) / min(less for _, less in pairs)


def fastest(device: str = "auto") -> str:
    """Returns the fastest `dtype` of a base that keeps a CPU's activations in float32: `mixed` where products in
    bfloat16, roundings included, are measured to be faster by a sixth, else `float32`. On a GPU: what `auto` is there.
    """
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return MIXED if bfloat16_gain() > _WORTHWHILE else "float32"
