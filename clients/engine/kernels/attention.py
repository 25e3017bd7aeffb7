"""The parts of a decoder layer between its matrix products, each with a backward pass written by hand.

With small models these parts cost as much as the products. Written as one autograd function each, they keep less, copy
less and skip the gradients of frozen weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from untether.clients.engine.kernels.gemm import plain_products
from untether.clients.engine.kernels.packing import Index, Packing


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


class TokenLosses(torch.autograd.Function):
    """weight * cross entropy of each row of logits [n, vocabulary] against targets [n]; returns [n], differentiable.

    PyTorch's own fills one more tensor of the vocabulary's width with zeros and reads it again.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logs = torch.log_softmax(logits.to(weight.dtype), dim=-1)
        losses = -logs.gather(1, targets[:, None])[:, 0] * weight
        ctx.save_for_backward(logs.exp_(), targets, weight)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, targets, weight = ctx.saved_tensors
        each = (grad * weight)[:, None]
        of_logits = (probabilities * each).scatter_add_(1, targets[:, None], -each)
        return of_logits.to(ctx.dtype), None, None


_LONG = 256
"""Tokens from which on PyTorch's fused attention on a CPU gains by oneDNN's products."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's fused attention. On a CPU it multiplies block by block: for all but long texts those products are so
    small that oneDNN, which `fast_products` would have it use, takes up to ten times as long as MKL.
    """
    with plain_products() if q.shape[-2] < _LONG else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., tokens, width] rotated by (cos, sin), halves as in Llama; in order in memory."""
    half, out = x.shape[-1] // 2, x.new_empty(x.shape)
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Rotary(torch.autograd.Function):
    """Rotary embedding (Su et al., arXiv 2104.09864): [rows, tokens, heads, width] -> [rows, heads, tokens, width]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        return _turned(x.transpose(1, 2), cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _turned(grad, ctx.cos, -ctx.sin).transpose(1, 2), None, None


class Take(torch.autograd.Function):
    """x [places, ...] -> [slots, width], as the index has it (`clients.engine.kernels.packing`)."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Index) -> Tensor:
        ctx.index, ctx.shape = index, x.shape
        return index.take(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.index.give(grad).view(ctx.shape), None


class Give(torch.autograd.Function):
    """x [slots, width] -> [places, width]: the adjoint of `Take`."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Index) -> Tensor:
        ctx.index = index
        return index.give(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.index.take(grad), None


class PackedAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of short packed texts; keeps the probabilities for the backward pass.

    q [rows, tokens, heads, width], k and v [rows, tokens, groups, width]; cos, sin [rows, 1, tokens, width]; returns
    [rows, tokens, heads * width]. Below some 200 tokens, batched products beat PyTorch's CPU flash kernel, whose
    backward pass computes the probabilities anew.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float, packing: Packing):
        shape, groups = q.shape, k.shape[2]
        queries, keys = packing.queries(shape[2]), packing.keys(groups)
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        q, k, v = queries.take(_turned(q, cos, sin)), keys.take(_turned(k, cos, sin)), keys.take(v)
        out = torch.empty_like(q)
        kept = []
        with plain_products():
            for bucket, (own_q, own_out), (own_k, own_v) in _buckets(packing, shape, groups, (q, out), (k, v)):
                mask = packing.mask(bucket, groups, shape[2] // groups, q)
                scores = torch.baddbmm(mask, own_q, own_k.transpose(1, 2), alpha=scale)
                kept.append(torch.softmax(scores, dim=-1))
                torch.bmm(kept[-1], own_v, out=own_out)
        ctx.save_for_backward(q, k, v, cos, sin, *kept)
        ctx.sizes = shape, groups, scale, packing
        return queries.give(out).view(*shape[:2], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, cos, sin, *kept = ctx.saved_tensors
        shape, groups, scale, packing = ctx.sizes
        queries, keys = packing.queries(shape[2]), packing.keys(groups)
        grad = queries.take(grad)
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        pieces = _buckets(packing, shape, groups, (q, grad, of_q), (k, v, of_k, of_v))
        with plain_products():
            for p, (_, (own_q, own, own_of_q), (own_k, own_v, own_of_k, own_of_v)) in zip(kept, pieces, strict=True):
                of_p = torch.bmm(own, own_v.transpose(1, 2))
                of_s = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(scale)
                torch.bmm(of_s, own_k, out=own_of_q)
                torch.bmm(of_s.transpose(1, 2), own_q, out=own_of_k)
                torch.bmm(p.transpose(1, 2), own, out=own_of_v)
        of_q = _turned(queries.give(of_q).view(shape), cos, -sin)
        of_k, of_v = (keys.give(x).view(*shape[:2], groups, -1) for x in (of_k, of_v))
        return of_q, _turned(of_k, cos, -sin), of_v, None, None, None, None


def _buckets(packing: Packing, shape: torch.Size, groups: int, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]):
    """Each bucket with its parts of the tensors, as [texts * groups, a group's slots, width]."""
    at_query = at_key = 0
    heads = shape[2] // groups
    for bucket in packing.buckets:
        each = bucket.texts * groups
        queries, keys = each * heads * bucket.tokens, each * (bucket.prefix + bucket.tokens)
        yield (
            bucket,
            [x[at_query : at_query + queries].view(each, -1, x.shape[-1]) for x in of_queries],
            [x[at_key : at_key + keys].view(each, -1, x.shape[-1]) for x in of_keys],
        )
        at_query, at_key = at_query + queries, at_key + keys
