"""The frozen base: one resident Hugging Face causal LM that every adapter of a cohort shares.

It is loaded once a worker, never trained, and its linear layers ask a `Routing` which adapters the rows of the current
batch wear (see `clients.engine.lora_layers`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from untether.clients.engine import lora_layers
from untether.clients.engine.decoder import LeanDecoder
from untether.clients.engine.door.trial import try_out
from untether.clients.engine.kernels.gemm import MIXED, fastest
from untether.sim.core.errors import UserError
from untether.sim.prompts import chat_template
from untether.sim.prompts.checkpoint import context_length, read_checkpoint

DTYPES = {"float32": torch.float32, MIXED: torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class FrozenBase:
    """A frozen causal LM in eval mode with its tokenizer.

    Attributes: `model`, `tokenizer` (None for a bare model), `device`, `dtype` (of activations), `arithmetic` (that, or
    `mixed`), `context_length` (tokens), `end_ids` (token ids that end an answer), `fingerprint` (sha256 of
    configuration, weights and all that turns a text into token ids and back). `lean=False` keeps the model's own
    forward pass even where `clients.engine.decoder` has a faster one. `template_args`: see `sim.prompts.chat_template`.
    `mixed` holds the weights of the model's linear layers in bfloat16, and multiplies there: all else, the output layer
    among it, stays as it is.
    """

    def __init__(
        self, model: nn.Module, tokenizer=None, source: Path | None = None, lean: bool = True,
        template_args: Mapping[str, Any] | None = None, mixed: bool = False,
    ):  # fmt: skip
        model.requires_grad_(False)
        model.eval()
        if mixed:
            _narrow(model)
        self.model = model
        self.tokenizer = tokenizer
        if tokenizer is not None and template_args is not None:
            chat_template.tell(tokenizer, template_args)
        self._source = source
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.arithmetic = MIXED if mixed else str(weight.dtype)
        self.context_length = context_length(model.config)
        self.end_ids = _end_ids(model, tokenizer)
        self.routing = lora_layers.attach(model)
        self.lean = LeanDecoder(model, self.routing) if lean and LeanDecoder.supports(model) else None
        self.targets: dict[tuple[str, ...] | str, tuple[str, ...]] = {}
        self.tried: set[tuple[str, ...] | str] = set()
        self._select: Callable[[Tensor], Tensor] | None = None
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"a {type(model).__name__} has no output layer to decode with; give another model")
        head.register_forward_pre_hook(self._keep_selected)

    @classmethod
    def load(
        cls, name_or_path: str, dtype: str = "auto", device: str = "auto", attention: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> FrozenBase:  # fmt: skip
        """Loads a model by folder or hub name.

        dtype: `float32`, `mixed`, `bfloat16`, `float64`; `auto`: float32 on a CPU, bfloat16 on a GPU that has it; or
        `fastest` (`kernels.gemm.fastest`).
        device: `auto` takes the GPU if there is one. attention: Hugging Face's `attn_implementation`.
        template_args: what the chat template is given (`sim.prompts.chat_template`).
        Raises UserError if there is no such model, the names above are unknown, or the model is not what it says
        (`sim.prompts.checkpoint`, `clients.engine.door`).
        """
        where = _device(device)
        dtype = fastest(where.type) if dtype == "fastest" else dtype
        number = _dtype(dtype, where)
        model, tokenizer, source = read_checkpoint(str(name_or_path), "model.base", number, attention)
        base = cls(model.to(where), tokenizer, source, template_args=template_args, mixed=dtype == MIXED)
        if base.lean is None:  # the leaner way is for few architectures, each of which is known to be right
            try_out(base.model, base.logits_at, f"model.base = {str(name_or_path)!r}")
        return base

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the model's and, where it has a tokenizer, over how prompts are written and answers ended
        (`sim.prompts.chat_template.fingerprint`). The same wherever the files lie.
        """
        if self.tokenizer is None:
            return self._model_fingerprint()
        written = chat_template.fingerprint(self.tokenizer, self.end_ids)
        return hashlib.sha256(f"{self._model_fingerprint()} {written}".encode()).hexdigest()

    @property
    def written(self) -> dict[str, Any]:
        """How prompts are written and answers ended, in full (`sim.prompts.chat_template.facts`); empty for a bare
        model.
        """
        return chat_template.facts(self.tokenizer, self.end_ids) if self.tokenizer is not None else {}

    def _model_fingerprint(self) -> str:
        """sha256 over config.json and the weight files, or over the weights in memory where there are no files."""
        digest = hashlib.sha256()
        if self._source is not None:
            files = sorted([self._source / "config.json", *self._source.glob("*.safetensors")])
            files = files if len(files) > 1 else sorted([*files, *self._source.glob("*.bin")])
            for file in files:
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
            return digest.hexdigest()
        config = self.model.config.to_dict()
        config = {key: config[key] for key in config if key not in ("transformers_version", "_name_or_path")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def logits_at(self, positions: Tensor, input_ids: Tensor, **inputs) -> Tensor:
        """Logits [positions, vocabulary] of chosen positions only; the head never sees the others.

        positions: indices [n] into the flattened [rows * tokens] of input_ids, in row order; on the CPU, so that nobody
        waits for a GPU to tell them. inputs: attention_mask, position_ids, past_key_values and use_cache as in Hugging
        Face's forward, and packing (see `LeanDecoder.hidden_at`).
        """
        whole = self.routing.route

        def select(hidden: Tensor) -> Tensor:
            if whole is not None:
                rows = torch.div(positions, input_ids.shape[1], rounding_mode="floor")
                self.routing.route = whole.select(rows)
                self.routing.route.tokens = 1
            return hidden.reshape(-1, 1, hidden.shape[-1])[positions.to(hidden.device)]

        if whole is not None:
            whole.tokens = input_ids.shape[1]
        try:
            if self.lean is not None:
                hidden = self.lean.hidden_at(positions, input_ids, **inputs)
                return self.model.get_output_embeddings()(hidden)[:, 0]
            self._select = select
            return self.model(input_ids=input_ids, **inputs).logits[:, 0]
        finally:
            self._select = None
            self.routing.route = whole

    def _keep_selected(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """What the output layer sees, whichever way the model comes to it."""
        if self._select is None:
            return None
        return (self._select(arguments[0]), *arguments[1:])


def _narrow(model: nn.Module) -> None:
    """Linear layers in bfloat16. Not the output layer: logits a bit apart are what tells one answer from another, and
    its weights are often the embedding's, too.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if lora_layers.is_linear(module) and module is not head:
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)


def _end_ids(model: nn.Module, tokenizer) -> frozenset[int]:
    found: set[int] = set()
    if tokenizer is not None and (end := chat_template.turn_end(tokenizer)) is not None:
        found.add(end)
    for holder in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(found)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:<index>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} is asked for and PyTorch sees no GPU; use auto or cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; use auto, fastest, {', '.join(DTYPES)}")
    return DTYPES[name]
