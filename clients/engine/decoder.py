"""A faster forward pass for decoders of the Llama family than their own `forward`.

It computes what Hugging Face's Llama, Qwen2, Qwen3, Gemma and Phi-3 compute, from the same weights, but: q, k, v run
together, and gate, up; the parts in between are `clients.engine.kernels.attention`; the last layer drops every position
whose output is not needed right after its attention; and no mask is built where causal order is enough. Models with
anything else in them (sliding windows, partial rotary embedding, another class) keep their own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from untether.clients.engine.kernels.attention import (
    Give,
    PackedAttention,
    RMSNorm,
    Rotary,
    SwiGLU,
    Take,
    fused_attention,
)
from untether.clients.engine.kernels.packing import Packing
from untether.clients.engine.lora_layers import Routing, adapted_linear, adapted_linears, joint_linear

_SHORT = 192
"""Longest texts, in tokens, for which attention keeps its probabilities."""

_FAMILY = (
    transformers.LlamaForCausalLM,
    transformers.Qwen2ForCausalLM,
    transformers.Qwen3ForCausalLM,
    transformers.GemmaForCausalLM,
    transformers.Phi3ForCausalLM,
)


@dataclass
class _Joint:
    """Linear layers with a common input: joint weight [sum of outs, in] and bias, and each one's name and share."""

    weight: Tensor
    bias: Tensor | None
    names: tuple[str, ...]
    widths: list[int]

    def __post_init__(self) -> None:
        self.key = self.names[0] if len(self.names) == 1 else self.names
        self.weights = self.weight.split(self.widths)
        self.biases = self.bias.split(self.widths) if self.bias is not None else [None] * len(self.widths)


@dataclass
class _Layer:
    qkv: _Joint
    out: _Joint
    gate_up: _Joint
    down: _Joint
    block: nn.Module


class LeanDecoder:
    """The faster forward pass of a model (see the module). `supports(model)` says whether a model can use it."""

    def __init__(self, model: nn.Module, routing: Routing):
        self.model, self.routing = model, routing
        config = model.config
        self.body = model.model
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.gemma = isinstance(model, transformers.GemmaForCausalLM)
        self.gelu = config.hidden_act != "silu"
        names = {id(module): name for name, module in routing.names.items()}
        self.layers = [self._layer(block, names) for block in self.body.layers]
        for layer in self.layers:
            routing.fusions += [joint.names for joint in (layer.qkv, layer.gate_up) if len(joint.names) > 1]

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Returns whether the model is one of the family and uses nothing that this forward pass lacks."""
        config = model.config
        if type(model) not in _FAMILY or getattr(config, "hidden_act", "") not in ("silu", "gelu_pytorch_tanh"):
            return False
        rope = getattr(config, "rope_parameters", None) or {}
        layer_types = set(getattr(config, "layer_types", None) or ())
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        return (
            rope.get("partial_rotary_factor", 1.0) in (None, 1.0) and layer_types <= {"full_attention"} and not windowed
        )

    def splits(self, longest: int) -> bool:
        """Returns whether texts of at most `longest` tokens are packed with their prefixes apart (see `Packing`)."""
        return longest <= _SHORT and self.body.embed_tokens.weight.device.type == "cpu"

    def _layer(self, block: nn.Module, names: dict[int, str]) -> _Layer:
        attention, mlp = block.self_attn, block.mlp
        fused = hasattr(attention, "qkv_proj")
        qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        joints = (_join(modules, names) for modules in (qkv, [attention.o_proj], gate_up, [mlp.down_proj]))
        return _Layer(*joints, block)

    def hidden_at(
        self,
        positions: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        packing: Packing | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Returns the final hidden states [positions, 1, hidden] at some positions.

        The current route is narrowed to those positions on return: the caller runs the head under it.

        Args:
            positions: [positions] Flattened places in input_ids.
            input_ids: [rows, tokens]
            attention_mask, position_ids: Not used with `packing`.
            past_key_values: The cache, if any.
            use_cache: Whether the cache takes the new tokens.
            packing: How several texts share a row.
            kept: [texts, n] Flattened places of the tokens of each text that an empty cache keeps; None: whole rows.
        """
        x = self.body.embed_tokens(input_ids)
        rows, tokens, _ = x.shape
        seen = past_key_values.get_seq_length() if use_cache else 0
        if packing:
            position_ids = packing.positions
        elif position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=x.device)[None]
        cos, sin = (part.unsqueeze(1) for part in self.body.rotary_emb(x, position_ids))
        mask = _attention_mask(attention_mask, tokens, seen) if not packing else None
        cache = _Cache(past_key_values, seen, kept) if use_cache else None
        whole = self.routing.route
        for index, layer in enumerate(self.layers):
            normed = self._norm(layer.block.input_layernorm, x)
            cut = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
            q, k, v = (part.view(rows, tokens, -1, self.width) for part in _cut(self._linear(layer.qkv, normed), cut))
            attended = self._attention(layer, index, q, k, v, cos, sin, mask, cache, packing)
            if index == len(self.layers) - 1:
                there = positions.to(x.device)
                attended = attended.reshape(rows * tokens, 1, -1)[there]
                x = x.reshape(rows * tokens, 1, -1)[there]
                if whole is not None:
                    self.routing.route = whole.select(torch.div(positions, tokens, rounding_mode="floor"))
            x = x + self._linear(layer.out, attended)[0]
            normed = self._norm(layer.block.post_attention_layernorm, x)
            gate, up = _cut(self._linear(layer.gate_up, normed), [layer.down.weight.shape[1]] * 2)
            inner = F.gelu(gate, approximate="tanh") * up if self.gelu else SwiGLU.apply(gate, up)
            x = x + self._linear(layer.down, inner)[0]
        return self._norm(self.body.norm, x)

    def _linear(self, joint: _Joint, x: Tensor) -> Sequence[Tensor]:
        """One output for each of the joint layers."""
        route = self.routing.route
        if route is not None and route.dropout is not None and len(joint.names) > 1:
            # Each adapter drops other inputs, as in PEFT, so the layers have nothing in common.
            each = zip(joint.names, joint.weights, joint.biases, strict=True)
            return [adapted_linear(x, weight, bias, route, name) for name, weight, bias in each]
        if torch.is_grad_enabled() or len(joint.names) == 1:
            return adapted_linears(x, joint.weights, joint.biases, route, joint.key)
        return joint_linear(x, joint.weight, joint.bias, joint.widths, route, joint.key)

    def _norm(self, module: nn.Module, x: Tensor) -> Tensor:
        if x.dtype == torch.float64 or self.gemma:
            # Hugging Face normalises float64 in float32: only its own code rounds alike.
            return module(x)
        return RMSNorm.apply(x, module.weight, module.variance_epsilon)

    def _attention(self, layer: _Layer, index: int, q, k, v, cos, sin, mask, cache, packing: Packing | None) -> Tensor:
        """[rows, tokens, heads * width]"""
        attention = layer.block.self_attn
        if hasattr(attention, "q_norm"):
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        scale = attention.scaling
        if packing and packing.split:
            if cache is not None:
                cache.fill(index, Rotary.apply(k, cos, sin), v)
            return PackedAttention.apply(q, k, v, cos, sin, scale, packing)
        q, k = Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)
        if cache is not None and not cache.seen:
            cache.fill(index, k, v)
        if packing:
            return self._whole_texts(q, k, v, scale, packing)
        v = v.transpose(1, 2)
        if cache is not None and cache.seen:
            k, v = cache.layers.update(k, v, index)
        rows, _, tokens, _ = q.shape
        grouped = self.heads != self.groups
        if tokens == 1 and grouped:
            q = q.reshape(rows, self.groups, self.heads // self.groups, self.width)
            grouped = False
        out = fused_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and tokens > 1, scale=scale, enable_gqa=grouped
        )
        return out.reshape(rows, self.heads, tokens, self.width).transpose(1, 2).reshape(rows, tokens, -1)

    def _whole_texts(self, q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> Tensor:
        """The same for packed texts by PyTorch's own kernels, which want every text as a row of its own."""
        rows, _, tokens, _ = q.shape
        queries, keys = packing.queries(1), packing.keys(1)
        q, k, v = Take.apply(q.transpose(1, 2), queries), Take.apply(k.transpose(1, 2), keys), Take.apply(v, keys)
        found, at = [], 0
        for bucket in packing.buckets:
            here = slice(at, at := at + bucket.texts * bucket.tokens)
            own = (x[here].view(bucket.texts, bucket.tokens, -1, self.width).transpose(1, 2) for x in (q, k, v))
            out = fused_attention(
                *own, is_causal=True, scale=scale, enable_gqa=self.heads != self.groups
            )
            found.append(out.transpose(1, 2).reshape(bucket.texts * bucket.tokens, -1))
        return Give.apply(torch.cat(found), queries).view(rows, tokens, -1)


@dataclass
class _Cache:
    """Hugging Face's cache of `seen` tokens, and which ones an empty one is to hold (see `LeanDecoder.hidden_at`)."""

    layers: transformers.Cache
    seen: int
    kept: Tensor | None

    def fill(self, index: int, k: Tensor, v: Tensor) -> None:
        """Put in the first tokens of a layer: k [rows, groups, tokens, width], v [rows, tokens, groups, width]."""
        if self.kept is not None:
            k, v = (x.flatten(0, 1)[self.kept] for x in (k.transpose(1, 2), v))
            k = k.transpose(1, 2)
        self.layers.update(k, v.transpose(1, 2), index)


def _join(modules: list[nn.Linear], names: dict[int, str]) -> _Joint:
    """Join layers; their own weights become views of the joint one, so that nothing is held twice."""
    own, widths = tuple(names[id(module)] for module in modules), [module.out_features for module in modules]
    if len(modules) == 1:
        return _Joint(modules[0].weight.detach(), modules[0].bias, own, widths)
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias.detach() for module in modules])
    joint = _Joint(weight, bias, own, widths)
    for module, part, part_bias in zip(modules, joint.weights, joint.biases, strict=True):
        module.weight.data = part
        if part_bias is not None:
            module.bias.data = part_bias
    return joint


def _cut(outputs: Sequence[Tensor], widths: list[int]) -> Sequence[Tensor]:
    """Outputs of the given widths, whether they come apart or (a layer fused in the model itself) in one tensor."""
    return outputs if len(outputs) > 1 else outputs[0].split(widths, dim=-1)


def _attention_mask(keys: Tensor | None, tokens: int, seen: int) -> Tensor | None:
    """Boolean [rows, 1, tokens, seen + tokens] from a mask of keys [rows, seen + tokens]; None where order is enough.

    A padding query may see itself: a fully masked row has no softmax.
    """
    if keys is None and (tokens == 1 or seen == 0):
        return None
    device = keys.device if keys is not None else None
    past = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=device).tril_(seen)
    if keys is None:
        return past[None, None]
    if tokens == 1:
        return keys.bool()[:, None, None, :]
    own = torch.zeros_like(past)
    own[torch.arange(tokens), seen + torch.arange(tokens)] = True
    return ((past[None] & keys.bool()[:, None, :]) | own[None])[:, None]
