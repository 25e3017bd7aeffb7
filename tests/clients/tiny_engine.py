"""Tiny random models of every architecture, and the oracle: separate runs of peft with torch's AdamW and clipping."""

from __future__ import annotations

import copy
import math
from functools import cache

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers as tf

from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.door.peft_format import peft_config
from untether.clients.engine.training import Example, TrainJob, batch_plan
from untether.sim.core.learning import LoraSpec, TrainSettings

torch.set_num_threads(1)  # two threads on such small tensors only wait for one another

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2")
VOCABULARY, END, PAD = 64, 1, 0


def tiny_model(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A two-layer model with weights large enough that every path through it matters."""
    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 if kind == "llama" else 2,
        max_position_embeddings=128, pad_token_id=PAD, eos_token_id=END, bos_token_id=2,
    )  # fmt: skip
    if kind == "gpt2":
        config = tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=END, bos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = tf.GPT2LMHeadModel(config)
    else:
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "phi3": "Phi3"}[kind]
        extra = {"head_dim": 8} if kind in ("qwen3", "gemma") else {}
        config = getattr(tf, f"{name}Config")(**common, **extra)
        model = getattr(tf, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.__class__ = _in_float64(type(module))
    return model.to(dtype).eval()


@cache
def _in_float64(norm: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """transformers normalises in float32 whatever the input is: too coarse to tell summing before from after."""

    class Exact(norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
            weight = 1 + self.weight if norm.__name__.startswith("Gemma") else self.weight
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    return Exact


def tiny_base(kind: str, dtype: torch.dtype = torch.float64) -> tuple[FrozenBase, torch.nn.Module]:
    """(the engine's base, an untouched copy for the oracle)."""
    model = tiny_model(kind, dtype)
    return FrozenBase(copy.deepcopy(model)), model


def random_state(base: FrozenBase, spec: LoraSpec, seed: int) -> dict[str, torch.Tensor]:
    """A PEFT state with A and B both away from zero."""
    stack = AdapterStack.create(base, [spec], [seed])
    draw = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value)
        for key, value in stack.state(0).items()
    }


def random_examples(seed: int, count: int, shared: int = 0) -> list[Example]:
    """Examples of random tokens whose prompts begin with the same `shared` ones."""
    draw = np.random.default_rng(seed)
    instruction = draw.integers(3, VOCABULARY, shared).tolist()
    return [
        Example(instruction + draw.integers(3, VOCABULARY, draw.integers(3, 30)).tolist(),
                draw.integers(3, VOCABULARY, draw.integers(1, 6)).tolist())
        for _ in range(count)
    ]  # fmt: skip


def mixed_jobs(base: FrozenBase) -> list[TrainJob]:
    """Four jobs that differ in everything a job can differ in."""
    specs = [LoraSpec(2, 16), LoraSpec(4, 8, use_rslora=True), LoraSpec(8, 4), LoraSpec(3, 6)]
    settings = [
        TrainSettings(1e-2, steps=10, batch_size=4, schedule="linear", warmup_ratio=0.2, max_grad_norm=0.3),
        TrainSettings(3e-3, steps=7, batch_size=4, schedule="cosine", warmup_ratio=0.1, weight_decay=0.1),
        TrainSettings(5e-3, steps=5, batch_size=3, schedule="constant", warmup_ratio=0.3, weight_decay=0.0),
        TrainSettings(2e-3, steps=10, batch_size=2, schedule="linear", betas=(0.8, 0.95), max_grad_norm=0.05),
    ]
    shared = (0, 20, 12, 20)
    return [
        TrainJob(
            k, random_examples(k, 5 + 3 * k, shared[k]), settings[k], specs[k], seed=k,
            state=random_state(base, specs[k], k),
        )
        for k in range(4)
    ]  # fmt: skip


def peft_model(model: torch.nn.Module, spec: LoraSpec, state: dict[str, torch.Tensor]) -> peft.PeftModel:
    """The same adapter in peft, on a copy of the model."""
    config = peft_config(spec, conv1d=isinstance(model, tf.GPT2LMHeadModel))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(wrapped, state)
    return wrapped.eval()


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, labels, attention mask) of a right-padded batch, as one writes them for transformers."""
    width = max(len(e.prompt_ids) + len(e.target_ids) for e in examples)
    ids = torch.full((len(examples), width), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, e in enumerate(examples):
        text = [*e.prompt_ids, *e.target_ids]
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        labels[row, len(e.prompt_ids) : len(text)] = torch.tensor(e.target_ids)
    return ids, labels, mask


def peft_loss(wrapped: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    ids, labels, mask = (part.to(wrapped.device) for part in padded(examples))
    logits = wrapped(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def peft_run(model: torch.nn.Module, job: TrainJob) -> tuple[dict[str, torch.Tensor], list[float]]:
    """(final state, losses) of a separate run on the job's batches."""
    wrapped = peft_model(model, job.spec, job.state)
    if job.trainable is not None:  # a whole side; peft knows no ranks
        for name, parameter in wrapped.named_parameters():
            for side in "AB":
                if f"lora_{side}" in name:
                    parameter.requires_grad_(all(getattr(job.trainable, side)))
    weights = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    s, plan = job.settings, batch_plan(job)
    optimizer = torch.optim.AdamW(weights, lr=s.learning_rate, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
    # The first step's rate is 0: it is left out.
    warmup, total = math.ceil(s.warmup_ratio * len(plan)) + 1, len(plan) + 1
    schedule = {
        "linear": lambda: tf.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: tf.get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: tf.get_constant_schedule_with_warmup(optimizer, warmup),
    }[s.schedule]()
    schedule.step()
    losses = []
    for batch in plan:
        loss = peft_loss(wrapped, [job.examples[index] for index in batch])
        if job.proximal_mu:
            far = sum(((weight - begun) ** 2).sum() for weight, begun in zip(weights, start, strict=True))
            (loss + job.proximal_mu / 2 * far).backward()
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, s.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False), losses


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max((a[key].to(torch.float64) - b[key].to(torch.float64)).abs().max().item() for key in a)


def prefixes_of(module, monkeypatch) -> list[int]:
    """How many tokens the lines that `module` packs from now on begin with in common; filled as it goes."""
    found, plain = [], module.pack

    def watched(rows, *inputs):
        found.extend(line.prefix for lines in rows for line in lines)
        return plain(rows, *inputs)

    monkeypatch.setattr(module, "pack", watched)
    return found
