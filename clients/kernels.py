"""The parts of a decoder layer between its matrix products, each with a backward pass written by hand.

With small models these parts cost as much as the products. Written as one autograd function each, they keep less, copy
less and skip the gradients of frozen weights.
"""

from __future__ import annotations

from dataclasses import dataclass

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


class TokenLosses(torch.autograd.Function):
    """weight * cross entropy of each row of logits [n, vocabulary] against targets [n]; returns [n], differentiable.

    PyTorch's own fills one more tensor of the vocabulary's width with zeros and reads it again.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logs = torch.log_softmax(logits.to(weight.dtype), dim=-1)
        losses = -logs.gather(1, targets[:, None])[:, 0] * weight
        ctx.save_for_backward(logs, targets, weight)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        logs, targets, weight = ctx.saved_tensors
        each = (grad * weight)[:, None]
        of_logits = logs.exp().mul_(each).scatter_add_(1, targets[:, None], -each)
        return of_logits.to(ctx.dtype), None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """out = x rotated by (cos, sin); all [..., tokens, width], any strides; halves as in Llama."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])


class Rotary(torch.autograd.Function):
    """Rotary embedding (Su et al., arXiv 2104.09864): [rows, tokens, heads, width] -> [rows, heads, tokens, width]."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        return _filled(x.transpose(1, 2), (cos, sin))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _filled(grad, (ctx.cos, -ctx.sin)).transpose(1, 2), None, None


class ShortAttention(torch.autograd.Function):
    """Rotary embedding and causal attention of short texts; keeps the probabilities for the backward pass.

    q [rows, tokens, heads, width], k and v [rows, tokens, groups, width]; cos, sin [1 or rows, 1, tokens, width];
    returns [rows, tokens, heads * width]. A row is one text, or `prefix` tokens and `texts` texts that go on from there
    (`clients.packing`). Below some 200 tokens, batched products beat PyTorch's CPU flash kernel, whose backward pass
    computes the probabilities anew.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float, prefix=0, texts=1):
        rows, tokens, heads, width = q.shape
        groups = k.shape[2]
        out = q.new_empty(rows, tokens, heads, width)
        kept, past = [], None
        for span in _spans(tokens, prefix, texts):
            turn = span.turn(cos, sin)
            own_q = _filled(span.view(q, groups), turn)
            own_k = _filled(span.view(k, groups), turn, past and past[0])
            own_v = _filled(span.view(v, groups), None, past and past[1])
            flat_q, flat_k, flat_v = (x.flatten(0, 2).flatten(1, 2) for x in (own_q, own_k, own_v))
            bars = _bars(span.tokens, flat_k.shape[1], q).repeat(heads // groups, 1).expand(len(flat_q), -1, -1)
            p = torch.softmax(torch.baddbmm(bars, flat_q, flat_k.transpose(1, 2), alpha=scale), dim=-1)
            span.view(out, groups).copy_(torch.bmm(p, flat_v).view(own_q.shape))
            kept += [flat_q, flat_k, flat_v, p]
            past = own_k, own_v
        ctx.save_for_backward(cos, sin, *kept)
        ctx.sizes = q.shape, groups, scale, prefix, texts
        return out.view(rows, tokens, heads * width)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin, *kept = ctx.saved_tensors
        (rows, tokens, heads, width), groups, scale, prefix, texts = ctx.sizes
        grad = grad.view(rows, tokens, heads, width)
        of_q = grad.new_empty(rows, tokens, heads, width)
        of_k, of_v = (grad.new_empty(rows, tokens, groups, width) for _ in range(2))
        later = None
        for span in reversed(_spans(tokens, prefix, texts)):
            q, k, v, p = kept[-4:]
            del kept[-4:]
            cos_here, sin_here = span.turn(cos, sin)
            own = span.view(grad, groups)
            flat = own.reshape(q.shape)
            of_s = torch._softmax_backward_data(torch.bmm(flat, v.transpose(1, 2)), p, -1, p.dtype).mul_(scale)
            _rotate_into(span.view(of_q, groups), torch.bmm(of_s, k).view(own.shape), cos_here, -sin_here)
            keys = (rows, groups, span.texts, 1, -1, width)
            grad_k = torch.bmm(of_s.transpose(1, 2), q).view(keys)
            grad_v = torch.bmm(p.transpose(1, 2), flat).view(keys)
            if later is not None:
                grad_k, grad_v = grad_k.add_(later[0]), grad_v.add_(later[1])
            seen = grad_k.shape[4] - span.tokens
            if seen:
                later = [x[..., :seen, :].sum(2, keepdim=True) for x in (grad_k, grad_v)]
            _rotate_into(span.view(of_k, groups), grad_k[..., seen:, :], cos_here, -sin_here)
            span.view(of_v, groups).copy_(grad_v[..., seen:, :])
        return of_q, of_k, of_v, None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of every row: from token `start`, `texts` texts of so many tokens."""

    start: int
    texts: int
    tokens: int

    def view(self, x: Tensor, groups: int) -> Tensor:
        """That part of x [rows, tokens, heads, width] as [rows, groups, texts, heads a group, tokens, width]."""
        part = x[:, self.start : self.start + self.texts * self.tokens].unflatten(1, (self.texts, self.tokens))
        return part.unflatten(3, (groups, x.shape[2] // groups)).permute(0, 3, 1, 4, 2, 5)

    def turn(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The rotation of one text's tokens, to go with `view`."""
        first, second = (x[:, :, None, None, self.start : self.start + self.tokens] for x in (cos, sin))
        return first, second


def _spans(tokens: int, prefix: int, texts: int) -> list[_Span]:
    own = _Span(prefix, texts, (tokens - prefix) // texts)
    return [_Span(0, 1, prefix), own] if prefix else [own]


def _filled(x: Tensor, turn: tuple[Tensor, Tensor] | None, past: Tensor | None = None) -> Tensor:
    """x [..., tokens, width], rotated if asked, in order in memory; behind `past`, which all its texts share."""
    seen = 0 if past is None else past.shape[-2]
    out = x.new_empty(*x.shape[:-2], seen + x.shape[-2], x.shape[-1])
    if seen:
        out[..., :seen, :] = past
    own = out[..., seen:, :]
    if turn is None:
        own.copy_(x)
    else:
        _rotate_into(own, x, *turn)
    return out


def _bars(queries: int, keys: int, like: Tensor) -> Tensor:
    """[queries, keys]: 0 where a query, one of the last so many tokens, may look; -inf where the key is later."""
    seen = keys - queries
    return torch.full((queries, keys), float("-inf"), dtype=like.dtype, device=like.device).triu_(seen + 1)
