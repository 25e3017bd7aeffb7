"""A preallocated key-value cache: it writes in place, where the stock one copies itself for every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, tokens, width], views into buffers for `capacity` tokens."""

    _layer_type = None

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends the new tokens and returns all."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            rows, heads, _, _ = key_states.shape
            self.key_buffer = key_states.new_empty(rows, heads, self.capacity, key_states.shape[-1])
            self.value_buffer = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
            self.is_initialized = True
        end = self.filled + key_states.shape[-2]
        self.key_buffer[:, :, self.filled : end] = key_states
        self.value_buffer[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Returns the number of tokens held."""
        return self.filled

    def take(self, rows: Tensor) -> None:
        """Keeps (or repeats) these rows only."""
        if self.is_initialized:
            buffers = []
            for filled in (self.keys, self.values):
                buffer = filled.new_empty(len(rows), filled.shape[1], self.capacity, filled.shape[3])
                torch.index_select(filled, 0, rows, out=buffer[:, :, : self.filled])
                buffers.append(buffer)
            self.key_buffer, self.value_buffer = buffers
            self.keys, self.values = (buffer[:, :, : self.filled] for buffer in buffers)


class PreallocatedCache(DynamicCache):
    """A cache for `capacity` tokens a row. Sliding-window layers stay as the model's configuration asks."""

    def __init__(self, config, capacity: int):
        super().__init__(config=config)
        self.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in self.layers]
        self._capacity = capacity

    def take(self, rows: Sequence[int] | Tensor) -> None:
        """Keeps (or repeats, in order) these rows only, in every layer, whether it has keys and values or a state."""
        for layer in self.layers:
            index = torch.as_tensor(rows, device=layer.device)
            if isinstance(layer, PreallocatedLayer):
                layer.take(index)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(index)
            else:
                layer.batch_select_indices(index)
