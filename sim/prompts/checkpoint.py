"""Reading a checkpoint: whole, as its own names say, with a tokenizer that fits it, or one sentence why not.

transformers fills weights that are not there with random numbers, puts an adapter's files on that lie in a folder, and
raises whatever the reader beneath it raises. None of that reaches a run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from untether.sim.core.errors import UserError
from untether.sim.core.text import shown
from untether.sim.prompts import chat_template

_HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Buffers that old checkpoints carry and that newer code makes itself."""

_UNBOUNDED_CONTEXT = 1 << 20
_GIT_LFS = b"version https://git-lfs"


def read_checkpoint(
    name: str, field: str, dtype: torch.dtype | str, attention: str | None = None, **tokenizer_args: Any
) -> tuple[Any, Any, Path | None]:
    """Returns a causal LM in eval mode, its tokenizer, and the folder that it lies in.

    Args:
        name: Folder or hub name.
        field: What to call it in an error, such as `model.base`.
        dtype: PyTorch's, or `auto` for that of the checkpoint.
        attention: Hugging Face's `attn_implementation`.

    Raises:
        UserError: It cannot be loaded, is an adapter or has one beside it, lacks weights or has foreign ones, its
            tokenizer has tokens that it has no embeddings for, or its chat template drops the text.
    """
    said = f"{field} = {str(name)!r}"
    _no_adapter(str(name), said)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # whatever the reader of this kind of file raises
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        raise UserError(_why_not(str(name), said, error)) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **tokenizer_args)
        config_file = cached_file(str(name), "config.json")
    except Exception as error:
        raise UserError(
            f"{said}: its tokenizer cannot be loaded ({_line(error)}). Put the model's tokenizer files beside its "
            "weights"
        ) from error
    _whole(info, said)
    _fits(model, tokenizer, said)
    chat_template.check(tokenizer, said)
    return model.eval(), tokenizer, Path(config_file).parent if config_file else None


def context_length(config: Any) -> int:
    """Returns how many tokens a model with this configuration reads, of which all stay what they are whatever else is
    in their batch. One for several kinds of input has its text's in an inner configuration.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond, one long row would change all others of its batch
        name = "original_max_position_embeddings"
        value = rope.get(name) or getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _UNBOUNDED_CONTEXT


def _no_adapter(name: str, said: str) -> None:
    try:
        found = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
    except Exception:  # no such folder or name: said when the model is loaded
        return
    if not found:
        return
    if (Path(found).parent / "config.json").is_file():
        raise UserError(
            f"{said}: an adapter's files (adapter_config.json) lie in the model's folder, and transformers would put "
            "it on by itself. Move them elsewhere: the base must be the model alone"
        )
    raise UserError(
        f"{said} is an adapter, not a model. Give the model that it was made for (base_model_name_or_path in its "
        "adapter_config.json)"
    )


def _why_not(name: str, said: str, error: Exception) -> str:
    line = _line(error)
    if isinstance(error, ImportError):
        return f"{said} needs a package that is not installed: {line}. Install it, or give a checkpoint without it"
    folder = Path(name)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    for file in weights:
        with file.open("rb") as stream:
            if stream.read(len(_GIT_LFS)) == _GIT_LFS:
                return (
                    f"{said}: {file.name} is a git-lfs pointer, not the weights. Fetch them with `git lfs pull`, or "
                    "download the model anew"
                )
    if type(error).__name__ == "SafetensorError":
        return f"{said}: its weights cannot be read ({line}); the file is cut or broken. Download it again"
    if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):
        return f"{said}: its weights have other shapes than its config.json says. Give both files of the same model"
    if kind := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", str(error)):
        return (
            f"{said}: a model with a {kind[1]} does not continue a text by itself. Give a causal LM, such as the one "
            "within it"
        )
    return (
        f"{said}: the model cannot be loaded ({line}); give a folder with config.json, weights and tokenizer files, or "
        "the name of a causal LM on the Hugging Face hub"
    )


def _whole(info: dict[str, Any], said: str) -> None:
    """Raises UserError where weights were missing (they are random now), foreign or of another shape."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in info.get("mismatched_keys") or ())
    foreign = sorted(key for key in info.get("unexpected_keys") or () if not key.endswith(_HARMLESS))
    if missing:
        more = f", and {len(foreign)} that it does not know, such as {foreign[0]!r}" if foreign else ""
        raise UserError(
            f"{said}: {len(missing)} of the model's weights are not in its files, such as {missing[0]!r}{more}. They "
            "would be random numbers. Give the whole checkpoint under the names of its architecture (a wrapper's "
            "prefix taken off, tie_word_embeddings as it was trained)"
        )
    if mismatched:
        raise UserError(f"{said}: {mismatched[0]} has another shape than config.json says. Give both of the same model")
    if foreign:
        raise UserError(
            f"{said}: {len(foreign)} weights in its files are not the model's, such as {foreign[0]!r}. Give a "
            "checkpoint of the architecture that its config.json names"
        )


def _fits(model: Any, tokenizer: Any, said: str) -> None:
    """Raises UserError where the tokenizer can write a token that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((token for token, number in vocabulary.items() if number >= rows), key=vocabulary.__getitem__)
    if beyond:
        raise UserError(
            f"{said}: its tokenizer has {len(beyond)} tokens that the model has no embedding for, such as "
            f"{shown(beyond[0], 40)!r} (the model has {rows}). Give the tokenizer that it was trained with, or resize "
            "and train the model (resize_token_embeddings)"
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"{said}: a {type(model).__name__} has no output layer that adapters can decode with")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0], 240) if lines else type(error).__name__
