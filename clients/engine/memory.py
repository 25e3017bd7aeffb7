"""The memory budget of a cohort, and how running out of memory is recognised."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from functools import cache

import torch

from untether.sim.core import limits

_SHARE = 0.5
"""Share of the free memory that all workers of a machine (or container) together take where no budget is given."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "failed to allocate", "bad allocation")


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that are free now on the device, or for this process and its group in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return limits.available_bytes()


def workers_here() -> int:
    """Returns how many workers this machine has capacity for (Ray's resource `worker`); 1 where there is no Ray."""
    ray = sys.modules.get("ray")  # a worker outside Ray need not import it to know
    if ray is None or not ray.is_initialized():
        return 1
    here = ray.get_runtime_context().get_node_id()
    offered = (node["Resources"].get("worker", 1) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, int(next(offered, 1)))


def budget_bytes(asked: int | None, device: torch.device) -> int:
    """Returns the budget asked for, or this worker's part of half of what is free."""
    return asked if asked else int(free_bytes(device) * _SHARE / workers_here())


@cache
def keep_heap() -> None:
    """Makes the allocator keep what a pass frees for the next pass (glibc only), until `give_back`.

    By default glibc returns large blocks to the system at once and gets them anew, page by page, for the next tensor: a
    fifth of the time of training a small model.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 256 << 20)


def give_back() -> None:
    """Gives freed heap memory back to the system: batches of many shapes fragment it (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def activation_bytes_per_token(config, itemsize: int) -> int:
    """Returns a generous estimate of what one token keeps for the backward pass."""
    config = config.get_text_config()
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # Gemma 3n has one a layer
    layers = getattr(config, "num_hidden_layers", 12)
    return itemsize * (layers * (20 * hidden + 8 * inner) + 3 * getattr(config, "vocab_size", 32000) // 2)
