"""One tiny life of a base model: prompts of unequal length, answered together and alone, must come to the same.

Many causal LMs keep a state that padding leaks into, regroup tokens, or compute with what else is in the batch. The
engine decodes many rows at once, so such a model would answer wrongly without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from untether.clients.engine.kernels.kv_cache import PreallocatedCache
from untether.sim.core.errors import UserError
from untether.sim.core.text import shown

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-3, torch.bfloat16: 0.3}
"""Largest difference of a logit, in standard deviations of the logits; what goes wrong differs by about one."""

_STEPS = 3


def try_out(model: Any, logits_at: Callable[..., Tensor], source: str) -> None:
    """Raises UserError where a model cannot decode rows of unequal length together as it decodes each alone.

    Args:
        logits_at: The engine's own way through the model (`FrozenBase.logits_at`).
        source: What to call the model in an error.
    """
    device, kind = next(model.parameters()).device, type(model).__name__
    prompts = _prompts(model)
    try:
        with torch.inference_mode():
            expected = [_alone(model, prompt.to(device)) for prompt in prompts]
            found = _together(model, logits_at, prompts, [told for told, _ in expected], device)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        said = str(error).strip().splitlines()
        reason = shown(said[0], 160) if said else type(error).__name__
        raise UserError(
            f"{source}: a {kind} cannot be decoded in batches here ({reason}). Give a model whose layers keep keys and "
            "values (Llama, Qwen, Gemma, Phi, GPT-2, OPT, ...)"
        ) from error
    for row, (_, logits) in enumerate(expected):
        if not torch.isfinite(logits).all():
            raise UserError(f"{source}: its weights give logits that are no numbers. Give one that is not broken")
        if apart := _apart(found[row], logits):
            raise UserError(
                f"{source}: a {kind} answers otherwise in a batch than alone (logits differ by {apart:.2g} standard "
                "deviations), so its answers could not be trusted. Give another model"
            )


def try_adapted(
    model: Any, logits_at: Callable[..., Tensor], layers: Mapping[str, torch.nn.Module],
    worn: Sequence[Mapping[str, tuple[Tensor, Tensor, float]]],
) -> float:  # fmt: skip
    """Returns how far, in standard deviations, logits of a batch whose rows wear other adapters are from those of each
    row alone, with its adapter added to what each layer gives; 0 where they are the same.

    Some models compute with a layer's weights beside the layer, or regroup what it sees.

    Args:
        logits_at: The engine's way through the model, with the adapters of `worn` routed to the batch's rows.
        layers: The adapted layers by name.
        worn: Of each of the first rows, (A, B, scaling) by layer; the last row wears none.
    """
    device, prompts, worst = next(model.parameters()).device, _prompts(model), 0.0
    with torch.inference_mode():
        expected = []
        for prompt, adapter in zip(prompts, [*worn, {}], strict=True):
            with _hooked(layers, adapter):
                expected.append(_alone(model, prompt.to(device)))
        found = _together(model, logits_at, prompts, [told for told, _ in expected], device, move=False)
    for row, (_, logits) in enumerate(expected):
        worst = max(worst, _apart(found[row], logits))
    return worst


@contextmanager
def _hooked(
    layers: Mapping[str, torch.nn.Module], adapter: Mapping[str, tuple[Tensor, Tensor, float]]
) -> Iterator[None]:
    def add(A: Tensor, B: Tensor, scaling: float) -> Callable[..., Tensor]:
        return lambda module, given, out: out + (given[0].to(A.dtype) @ A.T @ B.T * scaling).to(out.dtype)

    hooks = [layers[name].register_forward_hook(add(*parts)) for name, parts in adapter.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _prompts(model: Any) -> list[Tensor]:
    rows = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(0, rows, (length,), generator=draw) for length in (4, 13, 8)]


def _apart(found: Tensor, logits: Tensor) -> float:
    """The largest difference in standard deviations; 0 where it is of rounding."""
    scale = logits.float().std().clamp_min(1e-6)
    apart = ((found - logits).float().abs().max() / scale).item()
    return apart if apart > _TOLERANCE.get(logits.dtype, 0.3) else 0.0


def _alone(model: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """(the greedy continuation, the logits [steps, vocabulary] that led to it), by the model's own forward pass."""
    ids, logits = prompt[None], []
    for _ in range(_STEPS):
        logits.append(model(input_ids=ids, use_cache=False).logits[0, -1])
        ids = torch.cat([ids, logits[-1].argmax()[None, None]], 1)
    return ids[0, len(prompt) :], torch.stack(logits)


def _together(
    model: Any, logits_at: Callable[..., Tensor], prompts: list[Tensor], told: list[Tensor], device: torch.device,
    move: bool = True,
) -> list[Tensor]:  # fmt: skip
    """The logits of the same continuations, read with a cache from one left-padded batch; rows move up midway."""
    longest, count = max(map(len, prompts)), len(prompts)
    ids = torch.zeros(count, longest, dtype=torch.long)
    mask = torch.zeros(count, longest + _STEPS, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    cache = PreallocatedCache(model.config, longest + _STEPS)
    positions = (mask[:, :longest].cumsum(1) - 1).clamp_(min=0)
    found: list[list[Tensor]] = [[] for _ in prompts]
    live = list(range(count))
    at = torch.arange(1, count + 1) * longest - 1
    for step in range(_STEPS):
        logits = logits_at(
            at, ids, attention_mask=mask[:, : longest + step], position_ids=positions, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        for place, row in enumerate(live):
            found[row].append(logits[place])
        if step == 0 and move:  # as when an answer is complete: the others move up
            cache.take([0, 2, 1])
            order = torch.tensor([0, 2, 1], device=device)
            mask, positions, live = mask[order], positions[order], [live[0], live[2], live[1]]
        ids = torch.stack([told[row][step] for row in live])[:, None].to(device)
        positions = positions[:, -1:] + 1
        at = torch.arange(count)
    return [torch.stack(logits) for logits in found]
