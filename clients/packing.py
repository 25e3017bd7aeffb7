"""Texts that begin alike, laid out so that their common beginning is computed once.

All prompts of a task open with the same instruction: from a sixth of a sample's tokens (headlines) to more than half
(tags). Under one adapter those tokens have the same activations in every text, and a layer need not see them twice. A
row then holds the beginning, followed by what is each text's own; only attention knows where one text ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """A row of `prefix` tokens shared by `texts` texts, then `tokens` tokens of each text's own."""

    prefix: int
    texts: int
    tokens: int

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prefix + self.texts * self.tokens

    def positions(self, device: torch.device) -> Tensor:
        """Each token's position in its text, [width]."""
        whole = torch.arange(self.prefix + self.tokens, device=device)
        return torch.cat([whole[: self.prefix], whole[self.prefix :].repeat(self.texts)])

    def unpack(self, x: Tensor) -> Tensor:
        """[rows, width, ...] -> [rows * texts, prefix + tokens, ...]: every text as a row of its own."""
        own = x[:, self.prefix :].unflatten(1, (self.texts, self.tokens))
        shared = x[:, None, : self.prefix].expand(-1, self.texts, *x[:, : self.prefix].shape[1:])
        return torch.cat([shared, own], 2).flatten(0, 1)

    def pack(self, x: Tensor) -> Tensor:
        """The inverse of `unpack`: [rows * texts, prefix + tokens, ...] -> [rows, width, ...]."""
        x = x.unflatten(0, (-1, self.texts))
        return torch.cat([x[:, 0, : self.prefix], x[:, :, self.prefix :].flatten(1, 2)], 1)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with."""
    return len(os.path.commonprefix([list(text) for text in texts]))
