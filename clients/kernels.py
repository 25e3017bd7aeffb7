"""The parts of a decoder layer between its matrix products, each with a backward pass written by hand.

With small models these parts cost as much as the products. Written as one autograd function each, they keep less, copy
less and skip the gradients of frozen weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467), differentiable in x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(wide, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        scaled = grad.to(x.dtype) * weight
        shared = torch.linalg.vecdot(scaled, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(x, shared).to(grad.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), of_up


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """out = x rotated by (cos, sin); all [rows, heads, tokens, width], any strides; halves as in Llama."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])


class Rotary(torch.autograd.Function):
    """Rotary embedding (Su et al., arXiv 2104.09864): [rows, tokens, heads, width] -> [rows, heads, tokens, width]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _returned(grad, ctx.cos, ctx.sin), None, None


class ShortAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of short rows; keeps the probabilities for the backward pass.

    q [rows, tokens, heads, width], k and v [rows, tokens, groups, width]; cos, sin [1 or rows, 1, tokens, width];
    returns [rows, tokens, heads * width]. Below some 200 tokens, batched products beat PyTorch's CPU flash kernel,
    whose backward pass computes the probabilities anew.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        rows, tokens, heads, width = q.shape
        groups = k.shape[2]
        q, k = (_turned(x, cos, sin).view(rows * groups, -1, width) for x in (q, k))
        v = v.transpose(1, 2).reshape(rows * groups, tokens, width)
        bars = _bars(tokens, q).expand(rows * heads, tokens, tokens).reshape(rows * groups, -1, tokens)
        p = torch.softmax(torch.baddbmm(bars, q, k.transpose(1, 2), alpha=scale), dim=-1)
        out = torch.bmm(p, v).view(rows, heads, tokens, width).transpose(1, 2).reshape(rows, tokens, heads * width)
        ctx.save_for_backward(q, k, v, p, cos, sin)
        ctx.sizes = rows, tokens, heads, groups, width, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, p, cos, sin = ctx.saved_tensors
        rows, tokens, heads, groups, width, scale = ctx.sizes
        grad = grad.view(rows, tokens, heads, width).transpose(1, 2).reshape(rows * groups, -1, width)
        of_v = torch.bmm(p.transpose(1, 2), grad).view(rows, groups, tokens, width).transpose(1, 2).contiguous()
        of_p = torch.bmm(grad, v.transpose(1, 2))
        of_s = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(scale)
        of_q = _returned(torch.bmm(of_s, k).view(rows, heads, tokens, width), cos, sin)
        of_k = _returned(torch.bmm(of_s.transpose(1, 2), q).view(rows, groups, tokens, width), cos, sin)
        return of_q, of_k, of_v, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated [rows, tokens, heads, width] as [rows, heads, tokens, width]."""
    rows, tokens, heads, width = x.shape
    out = x.new_empty(rows, heads, tokens, width)
    _rotate_into(out, x.transpose(1, 2), cos, sin)
    return out


def _returned(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `_turned`, which is also its gradient."""
    rows, heads, tokens, width = grad.shape
    out = grad.new_empty(rows, tokens, heads, width)
    _rotate_into(out.transpose(1, 2), grad, cos, -sin)
    return out


def _bars(tokens: int, like: Tensor) -> Tensor:
    """[tokens, tokens]: 0 where a query may look, -inf where the key is later."""
    return torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
