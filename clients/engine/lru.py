"""A key-value cache with room to grow: writes in place, where the stock one copies itself for every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, tokens, width], views into buffers with room for `room` tokens."""

    _layer_type = None

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return all."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            rows, heads, _, _ = key_states.shape
            self.key_buffer = key_states.new_empty(rows, heads, self.room, key_states.shape[-1])
            self.value_buffer = value_states.new_empty(rows, heads, self.room, value_states.shape[-1])
            self.is_initialized = True
        end = self.filled + key_states.shape[-2]
        self.key_buffer[:, :, self.filled : end] = key_states
        self.value_buffer[:, :, self.filled : end] = value_states
        self.filled = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.filled

    def take(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows only."""
        if self.is_initialized:
            buffers = []
            for filled in (self.keys, self.values):
                buffer = filled.new_empty(len(rows), filled.shape[1], self.room, filled.shape[3])
                torch.index_select(filled, 0, rows, out=buffer[:, :, : self.filled])
                buffers.append(buffer)
            self.key_buffer, self.value_buffer = buffers
            self.keys, self.values = (buffer[:, :, : self.filled] for buffer in buffers)


class RoomyCache(DynamicCache):
    """A cache for `room` tokens a row. Sliding-window layers stay as the model's configuration asks."""

    def __init__(self, config, room: int):
        super().__init__(config=config)
        self.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in self.layers]
        self._room = room

    def take(self, rows: Sequence[int] | Tensor) -> None:
        """Keep (or repeat) these rows only, in every layer."""
        for layer in self.layers:
            index = torch.as_tensor(rows, device=layer.keys.device)
            if isinstance(layer, RoomyLayer):
                layer.take(index)
            else:
                layer.batch_select_indices(index)
