from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.autograd import gradcheck

from tests.clients import tiny_engine as engine
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.kernels.attention import PackedAttention, RMSNorm, Rotary, SwiGLU, TokenLosses
from untether.clients.engine.kernels.gemm import fast_products, onednn_is_exact, plain_products
from untether.clients.engine.kernels.lines import Line
from untether.clients.engine.kernels.packing import pack


def random(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def turn(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(1, 1, tokens, width // 2, dtype=torch.float64)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def test_gradients_of_the_kernels_are_right():
    cos, sin = turn(5, 8)
    assert gradcheck(lambda x: RMSNorm.apply(x, random(8).detach(), 1e-6), (random(3, 4, 8),))
    assert gradcheck(SwiGLU.apply, (random(3, 8), random(3, 8) * 2))
    assert gradcheck(lambda x: Rotary.apply(x, cos, sin), (random(2, 5, 4, 8),))


@pytest.mark.parametrize("split", [True, False], ids=["prefixes apart", "whole texts"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_packed_attention_is_that_of_every_text_alone(split, groups):
    lines = [[Line((0, 1, 2), 3, (5, 4, 7)), Line((3,), 0, (6,))], [Line((0, 1), 2, (9, 3))]]
    texts = [[np.zeros(length, int) for line in row for length in line.lengths] for row in lines]
    ids, places, packing = pack(lines, texts, torch.device("cpu"), split)
    angle = torch.rand(9, 4, dtype=torch.float64).repeat(1, 2)[packing.positions][:, None]
    cos, sin = angle.cos(), angle.sin()
    real = torch.from_numpy(np.unique(np.concatenate(places)))
    q, k, v = (random(*ids.shape, n, 8) for n in (4, groups, groups))

    def packed(q, k, v):
        if split:
            out = PackedAttention.apply(q, k, v, cos, sin, 0.3, packing)
        else:
            base, _ = engine.tiny_base("llama")
            decoder = copy.copy(base.lean)
            decoder.heads, decoder.groups, decoder.width = 4, groups, 8
            q, k = Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)
            out = decoder._whole_texts(q, k, v, 0.3, packing)
        return out.flatten(0, 1)[real]  # what stands in the gaps is nobody's

    found = torch.zeros(ids.size, 32, dtype=torch.float64)
    found[real] = packed(q, k, v)
    for place in places:
        own = (Rotary.apply(x, cos, sin).transpose(1, 2).flatten(0, 1)[place].transpose(0, 1)[None] for x in (q, k))
        alone = F.scaled_dot_product_attention(
            *own, v.flatten(0, 1)[place].transpose(0, 1)[None], is_causal=True, scale=0.3, enable_gqa=True
        )
        assert torch.allclose(found[place], alone[0].transpose(0, 1).flatten(1), atol=1e-12)
    assert gradcheck(packed, (q, k, v), fast_mode=True)


def test_token_losses_are_weighted_cross_entropies():
    logits, targets, weight = random(5, 7), torch.tensor([0, 6, 3, 3, 2]), torch.tensor([0.5, 0, 2, 1, 1]).double()
    losses = TokenLosses.apply(logits, targets, weight)
    assert torch.allclose(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weight)
    assert gradcheck(lambda x: TokenLosses.apply(x, targets, weight), (logits,))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_is_that_of_transformers(dtype, tolerance):
    norm = tf.models.llama.modeling_llama.LlamaRMSNorm(32).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = random(4, 6, 32, dtype=dtype) * 3
    assert torch.allclose(RMSNorm.apply(x, norm.weight, norm.variance_epsilon), norm(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("tokens", [9, 100])
def test_the_lean_way_gives_the_models_own_logits_in_float32(kind, tokens):
    model = engine.tiny_model(kind, torch.float32)
    own = FrozenBase(engine.tiny_model(kind, torch.float32), lean=False)
    lean = FrozenBase(model)
    assert own.lean is None and lean.lean is not None
    ids = torch.randint(3, engine.VOCABULARY, (3, tokens), generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(3 * tokens)
    with torch.no_grad():
        expected = own.logits_at(everywhere, ids, use_cache=False)
        assert torch.allclose(lean.logits_at(everywhere, ids, use_cache=False), expected, atol=2e-4)
    assert torch.allclose(lean.logits_at(everywhere, ids, use_cache=False), expected, atol=2e-4)
    assert torch.allclose(model(input_ids=ids).logits.flatten(0, 1), expected, atol=2e-4), (
        "the model itself still works"
    )


def test_other_models_keep_their_own_way():
    config = tf.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    assert FrozenBase(tf.Qwen2ForCausalLM(config)).lean is None
    assert engine.tiny_base("gpt2")[0].lean is None


def test_fast_products_stay_exact_and_leave_no_trace():
    a, b = random(3, 200, 160, dtype=torch.float32).detach(), random(3, 160, 96, dtype=torch.float32).detach()
    before = torch.backends.mkldnn.matmul.fp32_precision
    exact = a.double() @ b.double()
    plain = (torch.bmm(a, b) - exact).abs().max()
    with fast_products():
        fast = (torch.bmm(a, b) - exact).abs().max()
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == onednn_is_exact()
        with plain_products():
            assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == onednn_is_exact()
    assert fast <= 4 * plain
    assert torch.backends.mkldnn.matmul.fp32_precision == before
