"""What a device would need, in time, energy and memory, to train and to run the *nominal* model: the one a real device
would hold, not the small one that learns here. Device time therefore depends on model size and tokens.

FLOPs: a frozen weight costs 2 operations a token forward and 2 backward (there is no weight gradient), a LoRA weight 6;
attention's two products come on top; the output head is needed for target tokens only.
Decoding: a roofline (Williams et al., CACM 2009): each token reads all weights once and computes 2 operations a weight;
the slower of the two decides. Beside it each layer takes a fixed time a token, which is what a small model waits for.
`python -m bench.devices` holds it to what was measured on real devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from untether.sim.core.kinds import MODELS
from untether.sim.experiment.sections import Lora
from untether.sim.time.devices.backends import CACHE_SHARE, CHECKPOINTING_TIME, RUNTIME_BYTES, STORED_BITS, backend
from untether.sim.time.devices.heat import Heat as Heat
from untether.sim.time.hardware import Profile

GIGA = 1e9


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama family: sizes as in its `config.json`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True
    qkv_bias: bool = False
    further: int = 0
    """Weights beside these, such as more norms."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the linear maps of a layer, (in, out)."""
        query, value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query), "k_proj": (self.hidden, value), "v_proj": (self.hidden, value),
            "o_proj": (query, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    @cached_property
    def body(self) -> int:
        """Weights of the linear maps of all layers."""
        return self.layers * sum(a * b for a, b in self.linears().values())

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary

    @cached_property
    def parameters(self) -> int:
        """All of them: body, norms, biases, embedding and (untied) head."""
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = (2 * self.layers + 1) * self.hidden
        return self.body + biases + norms + self.head * (1 if self.tied else 2) + self.further

    def lora(self, rank: int, modules: tuple[str, ...]) -> int:
        """Weights of an adapter on these modules (`all-linear`: all but the head)."""
        wanted = [size for name, size in self.linears().items() if "all-linear" in modules or name in modules]
        return rank * self.layers * sum(a + b for a, b in wanted)


SHAPES: dict[str, ModelShape] = {
    "SmolLM2-135M": ModelShape(30, 576, 1536, 9, 3, 64, 49_152),
    "SmolLM2-360M": ModelShape(32, 960, 2560, 15, 5, 64, 49_152),
    "Qwen2.5-0.5B": ModelShape(24, 896, 4864, 14, 2, 64, 151_936, qkv_bias=True),
    "TinyLlama-1.1B": ModelShape(22, 2048, 5632, 32, 4, 64, 32_000, tied=False),
    "Llama-3.2-1B": ModelShape(16, 2048, 8192, 32, 8, 64, 128_256),
    "Qwen2.5-1.5B": ModelShape(28, 1536, 8960, 12, 2, 128, 151_936, qkv_bias=True),
    "SmolLM2-1.7B": ModelShape(24, 2048, 8192, 32, 32, 64, 49_152),
    "Qwen2.5-3B": ModelShape(36, 2048, 11_008, 16, 2, 128, 151_936, qkv_bias=True),
    "Llama-3.2-3B": ModelShape(28, 3072, 8192, 24, 8, 128, 128_256),
    "Qwen2.5-7B": ModelShape(28, 3584, 18_944, 28, 4, 128, 152_064, tied=False, qkv_bias=True),
    "SmolLM3-3B": ModelShape(36, 2048, 11_008, 16, 4, 128, 128_256),
    "gemma-3-1b": ModelShape(26, 1152, 6912, 4, 1, 256, 262_144, further=26 * (2 * 1152 + 2 * 256)),
    "Phi-4-mini": ModelShape(32, 3072, 8192, 24, 8, 128, 200_064),
}
"""The nominal models that are built in, from their published configurations."""


def model_shape(name: str) -> ModelShape:
    """Returns a nominal model by name (an organisation before it is ignored). Raises UserError for an unknown one."""
    short = name.rpartition("/")[2].removesuffix("-Instruct")
    return MODELS.get(short if short in MODELS else name)


@dataclass(frozen=True)
class CostModel:
    """The costs of one profile with one nominal model and adapter.

    `weight_bits` are those of the frozen base; `file_bytes` says what its weights take, where that is known.
    `checkpointing`: training keeps the inputs of layers only and computes the rest again in the backward pass.
    """

    profile: Profile
    model: ModelShape
    weight_bits: float = 16
    lora: Lora = Lora()
    checkpointing: bool = False
    file_bytes: float | None = None

    @cached_property
    def lora_weights(self) -> int:
        return self.model.lora(self.lora.rank, self.lora.target_modules)

    @property
    def training_flops_per_s(self) -> float:
        """While cool, without checkpointing."""
        return self.profile.compute_gflops * GIGA * self.profile.training_share

    def training_flops(self, tokens: float, targets: float | None = None, context: float = 128.0) -> float:
        """Operations of training on `tokens` tokens, `targets` of which carry loss (a quarter unless given), in rows of
        `context` tokens; those that checkpointing repeats are not counted.
        """
        targets = tokens / 4 if targets is None else targets
        attention = 3 * 4 * self.model.layers * self.model.heads * self.model.head_dim * context / 2
        return tokens * (4 * self.model.body + 6 * self.lora_weights + attention) + 4 * self.model.head * targets

    def training_s(self, tokens: float, targets: float | None = None, context: float = 128.0) -> float:
        """Seconds of training on a device that stays cool."""
        again = CHECKPOINTING_TIME if self.checkpointing else 1.0
        return again * self.training_flops(tokens, targets, context) / self.training_flops_per_s

    @cached_property
    def weight_bytes(self) -> float:
        """The frozen base, as stored and in memory."""
        bits = STORED_BITS.get(self.weight_bits, self.weight_bits)
        return self.model.parameters * bits / 8 if self.file_bytes is None else self.file_bytes

    @cached_property
    def read_bytes(self) -> float:
        """What a token reads of them: all but an embedding that is not the head too."""
        unread = 0.0 if self.model.tied else self.model.head / self.model.parameters
        return self.weight_bytes * (1 - unread)

    @cached_property
    def weights_bytes_per_s(self) -> float:
        """Bytes of weights a second that decoding reads while cool."""
        low_bit = backend(self.profile.backend).low_bit if self.weight_bits < 8 else 1.0
        return self.profile.memory_gb_per_s * GIGA * self.profile.decoding_share * low_bit

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token, 16 bits."""
        return 2 * 2 * self.model.layers * self.model.kv_heads * self.model.head_dim

    def prefill_s(self, prompt_tokens: int) -> float:
        """Seconds to read a prompt in one pass, on a cool device."""
        compute_s = 2 * self.model.body * prompt_tokens / (self.profile.prefill_gflops * GIGA)
        return max(self.read_bytes / self.weights_bytes_per_s, compute_s) + self.model.layers * self.profile.layer_s

    def token_s(self, seen: float) -> float:
        """Seconds to write one token after `seen` others, on a cool device."""
        cache_s = self.cache_bytes * seen / (self.weights_bytes_per_s * CACHE_SHARE)
        compute_s = 2 * (self.model.body + self.model.head) / (self.profile.prefill_gflops * GIGA)
        read_s = self.read_bytes / self.weights_bytes_per_s + cache_s
        return max(read_s, compute_s) + self.model.layers * self.profile.layer_s

    def decoding_s(self, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds to answer on a cool device: the prompt in one pass, then a token at a time."""
        return self.prefill_s(prompt_tokens) + new_tokens * self.token_s(prompt_tokens + new_tokens / 2)

    @cached_property
    def kept(self) -> int:
        """Numbers that the backward pass needs of a layer and token: what the norms, the attention and the gated MLP
        read, and the inputs of the maps that have an adapter (those of q, k and v are the same).
        """
        shape, lora = self.model, self.lora.target_modules
        on = {name for name in shape.linears() if "all-linear" in lora or name in lora}
        inputs = shape.hidden * (bool(on & {"q_proj", "k_proj", "v_proj"}) + bool(on & {"gate_proj", "up_proj"}))
        inputs += shape.intermediate * ("down_proj" in on)
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
        return 4 * shape.hidden + attention + 3 * shape.intermediate + inputs

    def training_bytes(self, row_tokens: int, targets: int | None = None) -> float:
        """Returns the memory that training needs, one row at a time (gradients are accumulated): the runtime, the
        weights, the adapter with gradient and AdamW's two moments in 32 bits, what the backward pass needs of a row (16
        bits; with checkpointing of one layer, and the inputs of all), and the logits of its targets (16 bits, and in 32
        bits with their gradient and the loss's own).
        """
        shape = self.model
        targets = math.ceil(row_tokens / 4) if targets is None else targets
        kept = shape.layers * shape.hidden + self.kept if self.checkpointing else shape.layers * self.kept
        logits = 12 * targets * shape.vocabulary
        return RUNTIME_BYTES + self.weight_bytes + 16 * self.lora_weights + 2 * row_tokens * kept + logits

    def decoding_bytes(self, tokens: int) -> float:
        """Returns the memory that answering needs, with so many tokens seen: the runtime, the weights, the adapter, the
        cache.
        """
        return RUNTIME_BYTES + self.weight_bytes + self.adapter_bytes() + self.cache_bytes * tokens

    @property
    def usable_bytes(self) -> float:
        """Returns the memory that the system lets a background job have."""
        return self.profile.ram_gib * 2**30 * self.profile.usable_ram

    def fits(self, row_tokens: int) -> bool:
        """Returns whether training does not end in `out_of_memory`."""
        return self.training_bytes(row_tokens) <= self.usable_bytes

    def adapter_bytes(self) -> int:
        """Returns the size of an adapter as stored (32 bits)."""
        return 4 * self.lora_weights

    def stored_bytes(self, adapters: int = 1, samples_bytes: float = 0.0) -> float:
        """Returns what a device keeps: the base, its adapters, and the synthetic samples."""
        return self.weight_bytes + adapters * self.adapter_bytes() + samples_bytes

    def energy_j(self, cool_s: float) -> float:
        """Returns the energy above an idle device of work that takes a cool one so long. Heat changes the time and not
        this: who is slowed down works at less power.
        """
        return self.profile.work_w * cool_s
