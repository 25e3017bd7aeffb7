"""The cohort engine, usable alone: many LoRA adapters trained and decoded together on one frozen base model.

Texts in, PEFT adapters out; see docs/engine.md. The modules below do the same with token ids and more settings. Modules
that need torch are imported when a function is called, so importing a module of this package costs only what that
module needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untether.sim.core.errors import UserError, unknown
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.seeding import derive

if TYPE_CHECKING:
    from torch import Tensor

    from untether.clients.engine.base import FrozenBase

__all__ = ["Adapter", "LoraSpec", "TrainSettings", "generate", "load", "load_peft", "save_peft", "train_adapters"]


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Args:
        spec: Its shape.
        state: Its weights under PEFT's keys, A [rank, in] and B [out, rank] of every target.
        losses: The mean loss of each step that it was trained for.
        outcome: `ok`, or `out_of_memory` where even one example did not fit (the weights are those before it).
    """

    spec: LoraSpec
    state: Mapping[str, Tensor]
    losses: tuple[float, ...] = ()
    outcome: str = "ok"


def load(
    base: str, dtype: str = "auto", device: str = "auto", template_args: Mapping[str, Any] | None = None
) -> FrozenBase:
    """Loads a frozen causal LM with its tokenizer.

    Args:
        base: Hugging Face folder or hub name.
        dtype: `float32`, `bfloat16`, `float64`, or `auto`: float32 on a CPU, bfloat16 on a GPU that has it.
        device: `cpu`, `cuda`, or `auto`: the GPU if there is one.
        template_args: Arguments of the chat template beside the messages.

    Raises:
        UserError: There is no such model, or no such dtype or device.
    """
    from untether.clients.engine.base import FrozenBase

    return FrozenBase.load(base, dtype, device, template_args=template_args or {})


def train_adapters(
    base: FrozenBase,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    settings: TrainSettings | Mapping[str, TrainSettings] | None = None,
    spec: LoraSpec | Mapping[str, LoraSpec] | None = None,
    seed: int = 0,
    memory_bytes: int | None = None,
) -> dict[str, Adapter]:
    """Trains an adapter on each list of (prompt, answer) pairs, all together. The loss is on the answers only.

    What an adapter learns depends on its own name, pairs and settings and on the seed; which others are trained beside
    it changes nothing but floating-point rounding.

    Args:
        base: The frozen base model.
        pairs: By the adapter's name. A prompt is one user message of the chat template.
        settings: How to train, for all or by name; the defaults of `TrainSettings` for those that are not named.
        spec: The adapters' shape, likewise.
        seed: Draws fresh adapters, the order of examples and dropout.
        memory_bytes: Budget for adapters and activations; by default half of what is free.

    Returns:
        The trained adapters by name.
    """
    from untether.clients.engine.encoding import encode_answer, encode_prompt
    from untether.clients.engine.training import Example, TrainJob, train

    jobs = [
        TrainJob(
            key=name,
            examples=[Example(encode_prompt(base.tokenizer, p), encode_answer(base.tokenizer, a)) for p, a in own],
            settings=_of(settings, name, TrainSettings),
            spec=_of(spec, name, LoraSpec),
            seed=derive(seed, name, "train"),
            init_seed=derive(seed, name, "adapter"),
        )
        for name, own in pairs.items()
    ]
    made = train(base, jobs, memory_bytes=memory_bytes).values()
    return {
        job.key: Adapter(job.spec, found.state, tuple(found.losses), found.outcome)
        for job, found in zip(jobs, made, strict=True)
    }


def generate(
    base: FrozenBase,
    adapters: Mapping[str, Adapter],
    rows: Sequence[tuple[str | None, str]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers (adapter's name, prompt) rows, decoded in batches of mixed adapters.

    Args:
        base: The frozen base model.
        adapters: By name.
        rows: A name of None asks the bare base model.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 is greedy; otherwise row i draws with its own seed, from (seed, i).
        seed: See `temperature`.

    Returns:
        The answers, in the order of the rows.

    Raises:
        UserError: A row names an adapter that is not given.
    """
    from untether.clients.engine.adapters import AdapterStack
    from untether.clients.engine.encoding import decode_answer, encode_prompt
    from untether.clients.engine.generation import GenerationRow
    from untether.clients.engine.generation import generate as decode

    worn = {name: slot for slot, name in enumerate(dict.fromkeys(name for name, _ in rows if name is not None))}
    for name in worn:
        if name not in adapters:
            raise UserError(unknown("adapter", name, adapters))
    stack = None
    if worn:
        own = [adapters[name] for name in worn]
        stack = AdapterStack.of_states(base, [one.spec for one in own], [dict(one.state) for one in own])
    encoded = [
        GenerationRow(encode_prompt(base.tokenizer, prompt), None if name is None else worn[name])
        for name, prompt in rows
    ]
    tokens = decode(
        base, stack, encoded, max_new_tokens=max_new_tokens, temperature=temperature,
        seeds=[derive(seed, row, "decode") for row in range(len(rows))],
    )  # fmt: skip
    return [decode_answer(base.tokenizer, ids) for ids in tokens]


def save_peft(folder: str | Path, adapter: Adapter, base: FrozenBase) -> None:
    """Writes an adapter as a folder that `peft.PeftModel.from_pretrained` loads."""
    from untether.clients.engine.door.peft_format import save_peft as write

    write(folder, adapter.spec, dict(adapter.state), base)


def load_peft(folder: str | Path) -> Adapter:
    """Reads a PEFT LoRA folder.

    Raises:
        UserError: The folder is none, or uses more than plain LoRA or rsLoRA.
    """
    from untether.clients.engine.door.peft_format import load_peft as read

    return Adapter(*read(folder))


def _of(given: Any, name: str, kind: type) -> Any:
    """What all have, or the one of this name; the defaults where nothing is said."""
    one = given.get(name) if isinstance(given, Mapping) else given
    return kind() if one is None else one
