"""Matrix products with frozen weights: the fastest exact kernel that PyTorch carries for the machine at hand.

PyTorch's plain fp32 `linear` calls MKL, which on AMD processors runs at less than half the rate of oneDNN (105 against
240 GFLOP/s on one core of an EPYC with AVX-512, most shapes). oneDNN's fp32 product is just as exact, and PyTorch ships
it as the operator that its compiler uses on CPUs, `mkldnn::_linear_pointwise`. It has no autograd formula; the weights
are frozen here, so only the gradient of the input is needed, which is one more product of the same kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _find_onednn():
    """oneDNN's linear operator if this build of PyTorch has it and it agrees with the plain one, else None."""
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
        weight = torch.arange(8, dtype=torch.float32).reshape(2, 4)
        if torch.equal(operator(x, weight, None, "none", [], ""), F.linear(x, weight)):
            return operator
    except (AttributeError, RuntimeError, TypeError):
        pass
    return None


_ONEDNN = _find_onednn()
_SMALLEST_ONEDNN_WORK = 1 << 20
"""Multiply-adds below which the operator's own overhead outweighs its rate."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias without autograd: x [..., in], weight [out, in] (any strides), bias [out]."""
    if (
        _ONEDNN is not None
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= _SMALLEST_ONEDNN_WORK
    ):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return product(grad, ctx.weight.t()), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, differentiable in x only."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return product(x, weight, bias)


def accelerate(module: torch.nn.Module) -> None:
    """Let every `nn.Linear` in a frozen module (an encoder, say) use `frozen_linear` from now on."""
    for child in module.modules():
        if type(child) is torch.nn.Linear:
            child.forward = _bound(child)


def _bound(linear: torch.nn.Linear):
    def forward(x: Tensor) -> Tensor:
        return frozen_linear(x, linear.weight, linear.bias)

    return forward
