"""Linear layers whose rows use different adapters: the one place where LoRA meets a frozen weight.

Every linear layer of the base asks the shared `Routing` for the current `Route`: which adapter each row of the batch
uses. Rows are grouped by adapter, rows without one last, so that all adapters of a layer apply in three batched
products: y = x W' + s (x A') B'. The backward pass is written by hand: it needs no gradient of W, adds the gradients of
A and B straight into the cohort's flat gradient matrix, and works in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from untether.clients.engine.kernels.gemm import frozen_linear, frozen_linears, plain_products

_ROUND_DEPTH = 16
"""Large groups of unequal size are padded to a multiple of so many rows: a product of a new shape is compiled first."""


_THIN = 16
"""Rows of a group up to which MKL's batched products are faster than oneDNN's: those of a step of decoding."""


@dataclass
class Piece:
    """One target's B [groups, rank, out] (transposed): adds to output `member`, fed by rows first..last of A."""

    B: Tensor
    grad_B: Tensor | None
    first: int
    last: int
    member: int


@dataclass
class LinearPart:
    """The adapters of one linear layer, or of several that share their input and run as one.

    A [groups, ranks, in] with the gradient matrix `grad_A` of the same shape (None when decoding), and the pieces.
    """

    names: tuple[str, ...]
    A: Tensor
    grad_A: Tensor | None
    pieces: list[Piece]


class Route:
    """Which adapter each leading row of the batch uses.

    Args:
        counts: Rows per group, in order; rows beyond their sum use none.
        rows: Rows of the batch.
        parts: Layer name (or tuple of names) -> its adapters.
        scale: [groups, 1, 1] Each adapter's alpha / rank.
        dropout: (layer name, route, input) -> mask like the input.
    """

    def __init__(
        self,
        counts: Sequence[int],
        rows: int,
        parts: dict[str | tuple[str, ...], LinearPart],
        scale: Tensor,
        dropout: Callable[[str, Route, Tensor], Tensor] | None = None,
    ):
        self.counts, self.rows, self.parts, self.scale, self.dropout = list(counts), rows, parts, scale, dropout
        self.groups, self.adapted = len(self.counts), sum(self.counts)
        self.tokens = 0
        """Tokens of each row of the batch that is being read, for layers that see all rows end to end."""
        self.depth = max(self.counts, default=0)
        self.regular = all(count == self.depth for count in self.counts)
        if not self.regular and self.depth > 2 * _ROUND_DEPTH:
            self.depth = -(-self.depth // _ROUND_DEPTH) * _ROUND_DEPTH
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
        """Returns the route of a batch whose leading dimension is `rows` of this one (indices in ascending order)."""
        ends = torch.cumsum(torch.tensor(self.counts), 0)
        inside = torch.searchsorted(rows.cpu().contiguous(), ends)
        counts = torch.diff(inside, prepend=torch.zeros(1, dtype=inside.dtype)).tolist()
        route = Route(counts, rows.shape[0], self.parts, self.scale, self.dropout)
        route.anchor = self.anchor
        return route

    def spread(self, x: Tensor, clear: bool = False) -> Tensor:
        """Groups rows by adapter: [rows, ..., width] -> [groups, depth * tokens, width]; `clear` zeroes the padding."""
        if self.regular:
            return x[: self.adapted].reshape(self.groups, -1, x.shape[-1])
        x = x[self._padded]
        if clear:
            x[~self._real] = 0
        return x.reshape(self.groups, -1, x.shape[-1])

    def collect(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Inverts `spread`: [groups, depth * tokens, width] -> [adapted rows, ..., width]."""
        if not self.regular:
            x = x.reshape(self.groups * self.depth, *shape[1:-1], x.shape[-1])[self._back]
        return x.reshape(self.adapted, *shape[1:-1], x.shape[-1])


Fusion = tuple[str, ...]
"""Names of layers that share their input and run together."""


@dataclass
class Routing:
    """The current route, which the patched layers read; None for the bare base."""

    route: Route | None = None
    fusions: list[Fusion] = field(default_factory=list)
    names: dict[str, nn.Module] = field(default_factory=dict)


def weight_of(module: nn.Module) -> Tensor:
    """Returns a linear layer's weight as [out, in], however it is stored."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module) -> bool:
    """Returns whether adapters can be attached to this module."""
    if isinstance(module, Conv1D) or type(module) is nn.Linear:
        return True
    # A subclass (Falcon's) that computes what its parent does, and only writes it otherwise.
    return isinstance(module, nn.Linear) and type(module).__name__ in ("FalconLinear",)


def attach(model: nn.Module) -> Routing:
    """Patches every linear layer of a frozen model to follow the returned routing."""
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
    """Returns x @ weight.T + bias plus every row's own adapter: x [rows, ..., in] -> [rows, ..., out]."""
    return adapted_linears(x, [weight], [bias], route, key)[0]


def adapted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    route: Route | None,
    key: str | tuple[str, ...],
) -> tuple[Tensor, ...]:
    """Returns the outputs [rows, ..., out] of several layers that share their input, as `adapted_linear` does."""
    part = route.parts.get(key) if route is not None and route.adapted else None
    if part is None:
        return frozen_linears(x, weights, biases)
    if x.shape[0] != route.rows:
        if x.dim() == 2 and route.tokens and x.shape[0] == route.rows * route.tokens:  # OPT lays rows end to end
            apart = adapted_linears(x.view(route.rows, route.tokens, -1), weights, biases, route, key)
            return tuple(y.flatten(0, 1) for y in apart)
        raise NotImplementedError(
            f"layer {key} sees {x.shape[0]} leading rows where the batch has {route.rows}: it regroups tokens, as the "
            "experts of a mixture do"
        )
    if torch.is_grad_enabled():
        return _AdaptedLinears.apply(x, route.anchor, weights, biases, part, route)
    return _forward(x, weights, biases, part, route)[0]


def joint_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int], route: Route | None, key: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Returns what `adapted_linears` does, without gradients, as one product with the joint weight: fewer calls."""
    outputs = frozen_linear(x, weight, bias).split(list(widths), dim=-1)
    part = route.parts.get(key) if route is not None and route.adapted else None
    if part is not None:
        _adapt(x, outputs, part, route)
    return outputs


def _forward(x: Tensor, weights, biases, part: LinearPart, route: Route):
    outputs = frozen_linears(x, weights, biases)
    return outputs, *_adapt(x, outputs, part, route)


def _adapt(
    x: Tensor, outputs: Sequence[Tensor], part: LinearPart, route: Route
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add the adapters to the outputs, in place; returns what the backward pass needs: (inputs, x A, dropout mask)."""
    inputs = route.spread(x).to(part.A.dtype)
    mask = route.dropout(part.names[0], route, x) if route.dropout is not None else None
    if mask is not None:
        mask = route.spread(mask)
        inputs = inputs * mask
    with plain_products() if inputs.shape[1] <= _THIN else nullcontext():
        low = torch.bmm(inputs, part.A.transpose(1, 2)).mul_(route.scale)
        for piece in part.pieces:
            _add_product(outputs[piece.member], low[:, :, piece.first : piece.last], piece.B, route)
    return inputs, low, mask


def _add_product(y: Tensor, left: Tensor, right: Tensor, route: Route, mask: Tensor | None = None) -> None:
    """Add left @ right [groups, ...] (times mask) to the adapted rows of y, in place."""
    if route.regular and mask is None and y.dtype == left.dtype:
        y[: route.adapted].view(route.groups, -1, y.shape[-1]).baddbmm_(left, right)
        return
    delta = torch.bmm(left, right)
    delta = route.collect(delta if mask is None else delta.mul_(mask), y.shape)
    y[: route.adapted].add_(delta)  # adds in the wider type and rounds once, as PEFT does


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, weights, biases, part, route):
        outputs, ctx.inputs, ctx.low, ctx.mask = _forward(x, weights, biases, part, route)
        ctx.weights, ctx.part, ctx.route = weights, part, route
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        part, route, low = ctx.part, ctx.route, ctx.low
        grad_low = torch.empty_like(low)
        for piece in part.pieces:
            own = route.spread(grads[piece.member], clear=True).to(low.dtype)
            rank = slice(piece.first, piece.last)
            grad_low[:, :, rank] = torch.bmm(own, piece.B.transpose(1, 2))
            piece.grad_B.baddbmm_(low[:, :, rank].transpose(1, 2), own)
        grad_low.mul_(route.scale)
        part.grad_A.baddbmm_(grad_low.transpose(1, 2), ctx.inputs)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        grad_x = frozen_linear(grads[0], ctx.weights[0].t())
        for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
            if grad.dtype == weight.dtype:
                grad_x.view(-1, grad_x.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), weight)
            else:
                grad_x += frozen_linear(grad, weight.t())
        _add_product(grad_x, grad_low, part.A, route, ctx.mask)
        return grad_x, None, None, None, None, None
