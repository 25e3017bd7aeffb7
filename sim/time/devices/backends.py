"""What the kernels of a kind of processor make of its peaks.

Every figure is fitted on the rows of `measurements.csv` that are marked `fit`, or says from what it is estimated;
`python -m bench.devices` prints how well they do on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from untether.sim.core.errors import UserError, unknown


@dataclass(frozen=True, slots=True)
class Kernels:
    """What runs language models on a kind of processor.

    `decoding_share`: of the memory bandwidth, with weights of 8 bits or more. `low_bit`: what of that is left with
    fewer bits (unpacking them costs). `layer_us`: microseconds a layer and token that no rate explains (launching
    kernels, waiting for threads). `prefill_share`: of the peak for products, reading a prompt.
    """

    decoding_share: float
    low_bit: float
    layer_us: float
    prefill_share: float


BACKENDS: dict[str, Kernels] = {
    # Fitted: gemma-3-1b and phi-4-mini on a Snapdragon 8 Elite Gen 5's cores. layer_us: an estimate, within what those
    # rows allow (the fit itself gives 0 to 60).
    "cpu": Kernels(0.63, 0.81, 40.0, 0.62),
    # Fitted: the same on its Adreno GPU. layer_us: an estimate between 0 (the fit) and what CUDA takes.
    "opencl": Kernels(0.59, 0.66, 60.0, 0.43),
    # Fitted: SmolLM3-3B on an iPhone 17 Pro (MLX); the split between share and layer_us is an estimate.
    "metal": Kernels(0.90, 1.0, 40.0, 0.60),
    # Fitted: Llama-3.2-3B on a Jetson Orin Nano (share) and SmolLM2-135M on its Super mode (layer_us). prefill_share:
    # an estimate, of the tensor cores' peak.
    "cuda": Kernels(0.83, 1.0, 145.0, 0.25),
    # Fitted: as `opencl`, on its Hexagon NPU. No peak of it is published in the units of these kernels, so
    # prefill_share is of the GPU's.
    "npu": Kernels(0.71, 0.92, 485.0, 0.285),
}  # fmt: skip
"""By name. `opencl`: GPUs of Android phones, Vulkan too; `metal`: Apple's GPUs; `npu`: Hexagon."""

CACHE_SHARE = 0.5
"""Bandwidth at which the keys and values of earlier tokens are read, as a share of that for weights. Fitted: SmolLM3-3B
on an iPhone 17 Pro after 256 and after 2,048 tokens."""

CHECKPOINTING_TIME = 1.23
"""What gradient checkpointing takes: the time with it over the time without. One more forward pass would be 1.5 by the
count of operations; measured is 1.18 to 1.28, as the forward pass is the faster one."""

STORED_BITS: dict[float, float] = {4: 4.5, 8: 8.5}
"""Bits a weight with its share of the scales: a 16-bit scale for 32 weights (ggml's q4_0 and q8_0), or a scale and a
bias for 64 (MLX). Others as they are."""

HEAD_BITS = 6.5625
"""Least bits of the embedding and of the head in 4-bit files of ggml (q6_K)."""

RUNTIME_BYTES = 300e6
"""What a process with a runtime takes before any weight (an estimate: 0.2 to 0.4 GB)."""


def backend(name: str) -> Kernels:
    """Returns a backend by name. Raises UserError for an unknown one."""
    if name not in BACKENDS:
        raise UserError(unknown("backend", name, BACKENDS))
    return BACKENDS[name]
