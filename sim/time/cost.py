"""What a device would need, in time, energy and memory, to train and to run the *nominal* model: the one a real device
would hold, not the small one that learns here. Device time therefore depends on model size and tokens.

FLOPs: a frozen weight costs 2 operations a token forward and 2 backward (there is no weight gradient), a LoRA weight 6;
attention's two products come on top; the output head is needed for target tokens only.
Decoding: a roofline (Williams et al., CACM 2009): each token reads all weights once and computes 2 operations a weight;
the slower of the two decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from untether.sim.core.kinds import MODELS
from untether.sim.experiment.sections import Lora
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

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear maps of a layer, (in, out)."""
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
        return self.body + biases + norms + self.head * (1 if self.tied else 2)

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
}
"""The nominal models that are built in, from their published configurations."""


def model_shape(name: str) -> ModelShape:
    """A nominal model by name (an organisation before it is ignored). Raises UserError for an unknown one."""
    short = name.rpartition("/")[2].removesuffix("-Instruct")
    return MODELS.get(short if short in MODELS else name)


@dataclass(frozen=True)
class CostModel:
    """The costs of one profile with one nominal model and adapter. `weight_bits` are those of the frozen base."""

    profile: Profile
    model: ModelShape
    weight_bits: int = 16
    lora: Lora = Lora()

    @cached_property
    def lora_weights(self) -> int:
        return self.model.lora(self.lora.rank, self.lora.target_modules)

    @property
    def training_flops_per_s(self) -> float:
        """While cool."""
        return self.profile.compute_gflops * GIGA * self.profile.training_share

    def training_flops(self, tokens: float, targets: float | None = None, context: float = 128.0) -> float:
        """Operations of training on `tokens` tokens, `targets` of which carry loss (a quarter unless given), in rows of
        `context` tokens.
        """
        targets = tokens / 4 if targets is None else targets
        attention = 3 * 4 * self.model.layers * self.model.heads * self.model.head_dim * context / 2
        return tokens * (4 * self.model.body + 6 * self.lora_weights + attention) + 4 * self.model.head * targets

    def training_s(self, tokens: float, targets: float | None = None, context: float = 128.0) -> float:
        """Seconds of training on a device that stays cool."""
        return self.training_flops(tokens, targets, context) / self.training_flops_per_s

    @property
    def weight_bytes(self) -> float:
        return self.model.parameters * self.weight_bits / 8

    def decoding_s(self, prompt_tokens: int, new_tokens: int) -> float:
        """Seconds to answer on a cool device: the prompt in one pass, then a token at a time."""
        memory, compute = self.profile.memory_gb_per_s * GIGA * self.profile.decoding_share, self.training_flops_per_s
        prompt_s = max(self.weight_bytes / memory, 2 * self.model.body * prompt_tokens / compute)
        cache = 2 * 2 * self.model.layers * self.model.kv_heads * self.model.head_dim  # bytes a token, 16 bits
        read = self.weight_bytes + cache * (prompt_tokens + new_tokens / 2)
        token_s = max(read / memory, 2 * (self.model.body + self.model.head) / compute)
        return prompt_s + new_tokens * token_s

    def training_bytes(self, row_tokens: int, targets: int | None = None) -> float:
        """Memory that training needs at least, one row at a time (gradients are accumulated): the weights, the adapter
        with gradient and AdamW's two moments in 32 bits, what the backward pass needs of a row (16 bits), and the
        logits of its targets with their gradient (32 bits).
        """
        shape = self.model
        targets = math.ceil(row_tokens / 4) if targets is None else targets
        kept = 6 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.intermediate
        activations = 2 * row_tokens * shape.layers * kept
        return self.weight_bytes + 16 * self.lora_weights + activations + 8 * targets * shape.vocabulary

    def fits(self, row_tokens: int) -> bool:
        """Whether training does not end in `out_of_memory`."""
        return self.training_bytes(row_tokens) <= self.profile.ram_gib * 2**30 * self.profile.usable_ram

    def adapter_bytes(self) -> int:
        """Size of an adapter as stored (32 bits)."""
        return 4 * self.lora_weights


@dataclass(frozen=True, slots=True)
class Heat:
    """How warm a device is, 0 (cool) to 1, and how that slows it down.

    Under load x' = (1 - x) / tau, else x' = -x / tau; it works at a speed of 1 - (1 - hot) x, so the work done after t
    seconds of load is hot t + (1 - hot)(1 - x0) tau (1 - exp(-t / tau)), in seconds of a cool device.
    """

    hot_share: float
    heating_s: float
    level: float = 0.0

    def work_in(self, duration_s: float) -> float:
        """Seconds of cool work that `duration_s` of load gets done."""
        decay = -math.expm1(-duration_s / self.heating_s)
        return self.hot_share * duration_s + (1 - self.hot_share) * (1 - self.level) * self.heating_s * decay

    def time_for(self, work_s: float) -> float:
        """Seconds of load until `work_s` of cool work is done (Newton's method on a concave rising function)."""
        time_s, excess = work_s, (1 - self.hot_share) * (1 - self.level)
        if work_s <= 0 or self.hot_share == 1:
            return work_s
        for _ in range(50):
            decay = math.exp(-time_s / self.heating_s)
            done_s = self.hot_share * time_s + excess * self.heating_s * (1 - decay)
            step_s = (work_s - done_s) / (self.hot_share + excess * decay)
            time_s += step_s
            if abs(step_s) <= 1e-9 * max(1.0, time_s):
                break
        return time_s

    def after(self, load_s: float = 0.0, rest_s: float = 0.0) -> Heat:
        """The state after load and then rest."""
        level = cooled(heated(self.level, load_s, self.heating_s), rest_s, self.heating_s)
        return Heat(self.hot_share, self.heating_s, level)


def heated(level: float, load_s: float, heating_s: float) -> float:
    """How warm it is after load."""
    return 1 - (1 - level) * math.exp(-load_s / heating_s)


def cooled(level: float, rest_s: float, heating_s: float) -> float:
    """How warm it is after rest."""
    return level * math.exp(-rest_s / heating_s) if level else 0.0
