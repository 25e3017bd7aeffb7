"""Linear layers whose rows wear different adapters: the one place where LoRA meets a frozen weight.

Every linear layer of the base asks the shared `Routing` for the current `Route`: which adapter each row of the batch
wears. Rows come grouped by adapter, rows without one last, so that all adapters of a layer apply in three batched
products: y = x W' + s (x A') B'. The backward pass is written by hand: it needs no gradient of W, adds the gradients of
A and B straight into the cohort's flat gradient matrix, and works in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Piece:
    """One target's B: `B` [groups, rank, out] adds to columns lo..hi of the output, fed by rows first..last of A."""

    B: Tensor
    grad_B: Tensor | None
    first: int
    last: int
    lo: int
    hi: int


@dataclass
class Part:
    """The adapters of one linear layer, or of several that share their input and run as one.

    A [groups, ranks, in] with the gradient matrix `grad_A` of the same shape (None when decoding), and the pieces.
    """

    names: tuple[str, ...]
    A: Tensor
    grad_A: Tensor | None
    pieces: list[Piece]


class Route:
    """Which adapter each leading row of the batch wears.

    counts: rows per group, in order; rows beyond their sum wear none. parts: layer name (or tuple of names) -> Part.
    scale [groups, 1, 1]: each adapter's alpha / rank. dropout: (layer name, route, input) -> mask like the input.
    """

    def __init__(
        self,
        counts: Sequence[int],
        rows: int,
        parts: dict[str | tuple[str, ...], Part],
        scale: Tensor,
        dropout: Callable[[str, Route, Tensor], Tensor] | None = None,
    ):
        self.counts, self.rows, self.parts, self.scale, self.dropout = list(counts), rows, parts, scale, dropout
        self.groups, self.adapted = len(self.counts), sum(self.counts)
        self.depth = max(self.counts, default=0)
        self.regular = all(count == self.depth for count in self.counts)
        self.anchor = torch.zeros((), device=scale.device, dtype=scale.dtype, requires_grad=True)
        if not self.regular:
            count = torch.tensor(self.counts)
            column = torch.arange(self.depth)
            real = column[None, :] < count[:, None]
            start = torch.cumsum(count, 0) - count
            self._padded = (start[:, None] + column).masked_fill(~real, 0).flatten().to(scale.device)
            self._real = real.flatten().to(scale.device)
            self._back = real.flatten().nonzero()[:, 0].to(scale.device)

    def select(self, rows: Tensor) -> Route:
        """The route of a batch whose leading dimension is `rows` of this one (indices in ascending order)."""
        ends = torch.cumsum(torch.tensor(self.counts), 0)
        inside = torch.searchsorted(rows.cpu().contiguous(), ends)
        counts = torch.diff(inside, prepend=torch.zeros(1, dtype=inside.dtype)).tolist()
        route = Route(counts, rows.shape[0], self.parts, self.scale, self.dropout)
        route.anchor = self.anchor
        return route

    def spread(self, x: Tensor, clear: bool = False) -> Tensor:
        """[rows, ..., width] -> [groups, depth * tokens, width]; `clear` zeroes the padding (it is a gradient)."""
        if self.regular:
            return x[: self.adapted].reshape(self.groups, -1, x.shape[-1])
        x = x[self._padded]
        if clear:
            x[~self._real] = 0
        return x.reshape(self.groups, -1, x.shape[-1])

    def collect(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `spread`: [groups, depth * tokens, width] -> [adapted rows, ..., width]."""
        if not self.regular:
            x = x.reshape(self.groups * self.depth, *shape[1:-1], x.shape[-1])[self._back]
        return x.reshape(self.adapted, *shape[1:-1], x.shape[-1])


Fusion = Sequence[tuple[str, int, int]]
"""Layers that run as one product: (name, first column, past the last column) of each in the joint output."""


@dataclass
class Routing:
    """What the patched layers look at: the current route, or None for the bare base."""

    route: Route | None = None
    fusions: list[Fusion] = field(default_factory=list)
    names: dict[str, nn.Module] = field(default_factory=dict)


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in], whichever way it is stored."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can sit on this module."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def attach(model: nn.Module) -> Routing:
    """Patch every linear layer of a frozen model to follow the returned routing."""
    routing = Routing()
    for name, module in model.named_modules():
        if is_linear(module):
            routing.names[name] = module
            module.forward = _forward_of(name, module, routing)
    return routing


def _forward_of(name: str, module: nn.Module, routing: Routing) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return adapted_linear(x, weight_of(module), module.bias, routing.route, name)

    return forward


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, route: Route | None, key: str | tuple[str, ...]
) -> Tensor:
    """x @ weight.T + bias plus every row's own adapter; x [rows, ..., in] -> [rows, ..., out]."""
    part = route.parts.get(key) if route is not None and route.adapted else None
    if part is None:
        return F.linear(x, weight, bias)
    if x.shape[0] != route.rows:
        raise NotImplementedError(
            f"layer {key} sees {x.shape[0]} leading rows where the batch has {route.rows}: adapters on layers that "
            "regroup tokens (mixtures of experts) are not supported"
        )
    if torch.is_grad_enabled():
        return _AdaptedLinear.apply(x, route.anchor, weight, bias, part, route)
    return _forward(x, weight, bias, part, route)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, part: Part, route: Route):
    y = F.linear(x, weight, bias)
    inputs = route.spread(x).to(part.A.dtype)
    mask = route.dropout(part.names[0], route, x) if route.dropout is not None else None
    if mask is not None:
        mask = route.spread(mask)
        inputs = inputs * mask
    low = torch.bmm(inputs, part.A.transpose(1, 2)).mul_(route.scale)
    in_place = route.regular and y.dtype == low.dtype
    if in_place:
        target = y[: route.adapted].view(route.groups, -1, y.shape[-1])
    else:
        target = low.new_zeros(route.groups, low.shape[1], y.shape[-1])
    for piece in part.pieces:
        target[:, :, piece.lo : piece.hi].baddbmm_(low[:, :, piece.first : piece.last], piece.B)
    if not in_place:
        delta = route.collect(target, y.shape)
        head = y[: route.adapted]
        head.copy_(head.to(delta.dtype) + delta)
    return y, inputs, low, mask


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, weight, bias, part, route):
        y, ctx.inputs, ctx.low, ctx.mask = _forward(x, weight, bias, part, route)
        ctx.weight, ctx.part, ctx.route = weight, part, route
        return y

    @staticmethod
    def backward(ctx, grad):
        part, route = ctx.part, ctx.route
        own = route.spread(grad, clear=True).to(ctx.low.dtype)
        grad_low = torch.empty_like(ctx.low)
        for piece in part.pieces:
            columns = own[:, :, piece.lo : piece.hi]
            grad_low[:, :, piece.first : piece.last] = torch.bmm(columns, piece.B.transpose(1, 2))
            piece.grad_B.baddbmm_(ctx.low[:, :, piece.first : piece.last].transpose(1, 2), columns)
        grad_low.mul_(route.scale)
        part.grad_A.baddbmm_(grad_low.transpose(1, 2), ctx.inputs)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.linear(grad, ctx.weight.t())
            if route.regular and ctx.mask is None and grad_x.dtype == grad_low.dtype:
                grad_x[: route.adapted].view(route.groups, -1, grad_x.shape[-1]).baddbmm_(grad_low, part.A)
            else:
                delta = torch.bmm(grad_low, part.A)
                delta = delta if ctx.mask is None else delta.mul_(ctx.mask)
                delta = route.collect(delta, grad_x.shape)
                head = grad_x[: route.adapted]
                head.copy_(head.to(delta.dtype) + delta)
        return grad_x, None, None, None, None, None
