"""PEFT's side of adapters: which layers its targets mean, its configuration, and its folders, read and written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from untether.clients.engine.base import FrozenBase
from untether.clients.engine.lora_layers import is_linear
from untether.sim.core import strict_json
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec
from untether.sim.core.text import shown

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def target_names(base: FrozenBase, spec: LoraSpec) -> tuple[str, ...]:
    """Returns the names of the layers that PEFT itself would adapt for this spec, in the model's order."""
    if spec.target_modules not in base.targets:
        base.targets[spec.target_modules] = _find_targets(base.model, spec.target_modules)
    return base.targets[spec.target_modules]


def _find_targets(model: torch.nn.Module, target_modules: tuple[str, ...] | str) -> tuple[str, ...]:
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    try:
        spec = LoraSpec(rank=1, target_modules=target_modules)
        wrapped = peft.get_peft_model(empty, peft_config(spec, beside=beside_text(model)))
    except ValueError as error:
        said = shown(str(error).strip().splitlines()[0], 200)
        raise UserError(
            f"target_modules {target_modules!r} do not fit the base model: {said}{attention_hint(model)}"
        ) from error
    names = tuple(name for name, module in wrapped.base_model.model.named_modules() if isinstance(module, LoraLayer))
    layers = dict(model.named_modules())
    for name in names:
        if not is_linear(layers[name]):
            kind = type(layers[name]).__name__
            raise UserError(
                f"target_modules {target_modules!r} match {name!r}, a {kind}; only linear layers can be adapted"
                + attention_hint(model)
            )
    return names


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"), "bias": ("none", None),
    "layers_pattern": (None, "", []), "layers_to_transform": (None, []), "fan_in_fan_out": (True, False, None),
    "lora_ga_config": (None, {}), "eva_config": (None, {}), "corda_config": (None, {}), "loftq_config": (None, {}),
}  # fmt: skip
"""What fields of PEFT's LoRA may say that changes nothing of a trained adapter; others must be empty or false."""

_MEANT = frozenset((
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "inference_mode",
    "base_model_name_or_path", "auto_mapping", "revision", "peft_version", "megatron_core", "runtime_config",
    "exclude_modules", "ensure_weight_tying", "qalora_group_size", "velora_config", "target_parameters", "arrow_config",
    "megatron_config", "trainable_token_indices", "use_qalora", "use_bdlora",
))  # fmt: skip


def _plain_lora(config: dict[str, object], file: Path) -> None:
    """Raises UserError where a folder's adapter computes anything beside plain or rank-stabilised LoRA."""
    for name in ("r", "lora_alpha", "target_modules"):
        if not config.get(name):
            raise UserError(f"{file}: no field {name}, which a LoRA adapter needs")
    odd = []
    for name, value in config.items():
        if name in _NEUTRAL:
            fine = any(value is known or (value == known and type(value) is type(known)) for known in _NEUTRAL[name])
        elif name in _MEANT:
            fine = name not in ("target_parameters", "arrow_config", "trainable_token_indices", "use_qalora",
                                "use_bdlora") or not value  # fmt: skip
        else:  # DoRA, aLoRA, rank patterns, and whatever a later PEFT brings
            fine = not value
        if not fine:
            odd.append(f"{name} = {shown(json.dumps(value, default=str), 40)}")
    if odd:
        raise UserError(f"{file}: {', '.join(odd)} cannot be loaded; only plain LoRA and rsLoRA can")


def beside_text(model: torch.nn.Module) -> list[str]:
    """Returns the layers that no text passes, of a model that takes images or sound too: they are given no adapters."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.get_decoder()
    inside = {id(module) for module in text.modules()} | {id(model.get_output_embeddings())}
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    return [name for name, module in leaves if id(module) not in inside]


def attention_hint(model: torch.nn.Module) -> str:
    """Returns the remedy for a model of which some layers cannot be adapted, such as the router of a mixture of
    experts: the names of those in its attention that can.
    """
    names = {
        name.rpartition(".")[2]: None for name, module in model.named_modules()
        if is_linear(module) and any(word in name.rpartition(".")[0] for word in ("attn", "attention"))
    }  # fmt: skip
    return f". Set lora.target_modules = {json.dumps(list(names))}, the layers of its attention" if names else ""


def peft_config(
    spec: LoraSpec, base_name: str | None = None, conv1d: bool = False, beside: Sequence[str] = ()
) -> peft.LoraConfig:
    """Returns a spec as PEFT's configuration. conv1d: the base keeps its weights as [in, out], as GPT-2 does; beside:
    layers that get no adapter, whatever the targets say.
    """
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets,
        use_rslora=spec.use_rslora, fan_in_fan_out=conv1d, base_model_name_or_path=base_name,
        exclude_modules=list(beside) or None,
    )  # fmt: skip


def save_peft(folder: str | Path, spec: LoraSpec, state: dict[str, Tensor], base: FrozenBase) -> None:
    """Writes a PEFT folder (adapter_config.json, adapter_model.safetensors) from a state under PEFT's keys."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = base.routing.names
    conv1d = any(isinstance(layers[name], Conv1D) for name in target_names(base, spec))
    config = peft_config(spec, base.model.config._name_or_path or None, conv1d, beside_text(base.model)).to_dict()
    config["inference_mode"] = True
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / _WEIGHTS, metadata={"format": "pt"})


def load_peft(folder: str | Path) -> tuple[LoraSpec, dict[str, Tensor]]:
    """Reads a PEFT LoRA folder as (spec, state under PEFT's keys).

    Raises:
        UserError: The folder is none, or uses what the stack does not support (DoRA, bias, ...).
    """
    folder = Path(folder)
    file, weights = folder / _CONFIG, folder / _WEIGHTS
    try:
        config = strict_json.loads(file.read_bytes())
        state = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a PEFT adapter folder ({error}); it needs {_CONFIG} and {_WEIGHTS}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{file}: peft_type {shown(str(kind), 40)!r}; only LORA can be loaded")
    _plain_lora(config, file)
    targets = config["target_modules"]
    try:
        if isinstance(targets, str):
            re.compile(targets)
        spec = LoraSpec(
            rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets),
            use_rslora=config.get("use_rslora", False),
        )  # fmt: skip
        if type(spec.rank) is not int or type(spec.use_rslora) is not bool:
            raise TypeError(f"r = {spec.rank!r}, use_rslora = {spec.use_rslora!r}")
        spec.scaling  # noqa: B018 - raises for what is no number
    except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise UserError(f"{file}: r, lora_alpha, use_rslora or target_modules are not LoRA's ({error})") from error
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{weights}: {shown(name, 80)} is {tensor.dtype}, and adapters have real ones")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{weights}: {name} has values that are no numbers. Train the adapter again")
        if ".lora_A." in name and tensor.shape[0] != spec.rank:
            raise UserError(f"{weights}: {name} is of rank {tensor.shape[0]}, and {_CONFIG} says r = {spec.rank}")
    return spec, state
