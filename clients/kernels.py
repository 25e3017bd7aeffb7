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
    """silu(gate) * up of a joint [..., gate | up] (Shazeer, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(gate_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate_up, opened = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        joint = torch.empty_like(gate_up)
        of_gate, of_up = joint.chunk(2, dim=-1)
        torch.mul(grad, opened, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return joint


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
        rows, tokens, heads, width = x.shape
        out = x.new_empty(rows, heads, tokens, width)
        _rotate_into(out, x.transpose(1, 2), cos, sin)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, heads, tokens, width = grad.shape
        out = grad.new_empty(rows, tokens, heads, width)
        _rotate_into(out.transpose(1, 2), grad, ctx.cos, -ctx.sin)
        return out, None, None


class ShortAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of short rows, with the probabilities kept for the backward pass.

    qkv [rows, tokens, heads + 2 * groups, width] (query heads, key heads, value heads); cos, sin [1 or rows, 1, tokens,
    width]; returns [rows, tokens, heads * width]. Below some 200 tokens, batched products beat PyTorch's CPU flash
    kernel, whose backward pass computes the probabilities anew.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float) -> Tensor:
        rows, tokens, slots, width = qkv.shape
        groups = (slots - heads) // 2
        turned = qkv.new_empty(rows, heads + groups, tokens, width)
        _rotate_into(turned, qkv[:, :, : heads + groups].transpose(1, 2), cos, sin)
        q = turned[:, :heads].reshape(rows * groups, -1, width)
        k = turned[:, heads:].reshape(rows * groups, tokens, width)
        v = qkv[:, :, heads + groups :].transpose(1, 2).reshape(rows * groups, tokens, width)
        bars = _bars(tokens, qkv).expand(rows * heads, tokens, tokens).reshape(rows * groups, -1, tokens)
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
        out = grad.new_empty(rows, tokens, heads + 2 * groups, width)
        of_v = torch.bmm(p.transpose(1, 2), grad)
        out[:, :, heads + groups :] = of_v.view(rows, groups, tokens, width).transpose(1, 2)
        of_p = torch.bmm(grad, v.transpose(1, 2))
        of_s = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(scale)
        turned = grad.new_empty(rows, heads + groups, tokens, width)
        turned[:, :heads] = torch.bmm(of_s, k).view(rows, heads, tokens, width)
        turned[:, heads:] = torch.bmm(of_s.transpose(1, 2), q).view(rows, groups, tokens, width)
        _rotate_into(out[:, :, : heads + groups].transpose(1, 2), turned, cos, -sin)
        return out, None, None, None, None


def _bars(tokens: int, like: Tensor) -> Tensor:
    """[tokens, tokens]: 0 where a query may look, -inf where the key is later."""
    return torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
