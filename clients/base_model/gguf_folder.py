"""A GGUF file as a Hugging Face folder, so that a quantised model can be a frozen base that adapters are trained on.

Weights are dequantised to float32, exactly as the file says. (transformers can load a GGUF itself, but then refuses to
save it, fills what is missing at random, and does not split a text as the file's own tokenizer says.) What is not
understood in full, a tensor, a rope or a way to split texts, is refused: a model that is nearly right is wrong unseen.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from untether.sim.core.errors import ResumableStop, UserError, disk_is_full
from untether.sim.experiment.models.catalogue import models_folder
from untether.sim.experiment.models.fetch import sha256_of

VERSION = 1
"""Changes where the same file is converted to something else: folders of another version are made anew."""

_MARK = "from_gguf.json"

_ARCHITECTURES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("gpt-2", "smollm", "qwen2")
"""Ways to split a text before its pairs of bytes are joined (`tokenizer.ggml.pre`)."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Types of tokens in a GGUF file."""


def folder_of(gguf: Path, folder: Path | None = None) -> Path:
    """Returns the Hugging Face folder of a GGUF file: `folder`, or one named after its content in the user's cache.

    It is made unless it is there. Raises UserError, naming the file, for what is no GGUF file of a decoder that can be
    converted; ResumableStop where the disk is full.
    """
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such GGUF file")
    digest = sha256_of(gguf)
    folder = folder or models_folder() / f"gguf-{digest[:16]}"
    mark = {"sha256": digest, "version": VERSION}
    if _mark_of(folder) == mark:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            convert(gguf, made)
            (made / _MARK).write_text(json.dumps(mark), encoding="utf-8")
            _put(made, folder, mark)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if disk_is_full(error):
            raise ResumableStop(f"no space to convert {gguf} in {folder.parent}: {error}. Free some") from error
        raise
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Writes configuration, float32 weights and tokenizer of a GGUF file into a folder. Raises UserError as
    `folder_of`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    reader = _read(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(gguf, facts, {tensor.name for tensor in reader.tensors})
    tokenizer, ends = _tokenizer(gguf, facts)
    weights = _weights(gguf, reader, config)
    with torch.device("meta"):
        wanted = {name: tuple(w.shape) for name, w in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise UserError(f"{gguf} is broken: {odd[0]} is {found.get(odd[0], 'missing')}, not {wanted.get(odd[0])}")
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=ends, do_sample=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _put(made: Path, folder: Path, mark: Mapping[str, Any]) -> None:
    """Moves a finished folder into its place, where another process may have put one meanwhile."""
    if folder.exists() and _mark_of(folder) != mark:
        shutil.rmtree(folder)
    try:
        os.rename(made, folder)
    except OSError:
        if _mark_of(folder) != mark:
            raise


def _mark_of(folder: Path) -> Any:
    try:
        return json.loads((folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read(gguf: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{gguf}: to read GGUF files, install the package gguf: pip install 'untether[gguf]'") from None
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{gguf} is no GGUF file: it begins with {magic!r}, not b'GGUF'")
    try:
        reader = GGUFReader(gguf)
        for field in reader.fields.values():
            field.contents()
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{gguf} is broken or cut short ({_first_line(error)}): fetch or copy it anew") from error
    return reader


def _config(gguf: Path, facts: Mapping[str, Any], tensors: set[str]) -> Any:
    import transformers

    kind = facts.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{gguf} is a model of the architecture `{kind}`, which is not converted here (known: "
            f"{', '.join(_ARCHITECTURES)}). Give the model's own Hugging Face folder or name"
        )

    def fact(name: str, *default: Any) -> Any:
        if f"{kind}.{name}" not in facts and not default:
            raise UserError(f"{gguf} is broken: it does not say {kind}.{name}")
        return facts.get(f"{kind}.{name}", *default)

    if fact("rope.scaling.type", "none") != "none":
        raise UserError(
            f"{gguf}: rope scaling `{fact('rope.scaling.type')}` is not converted here. Give the model's own "
            "Hugging Face folder or name"
        )
    heads, hidden = fact("attention.head_count"), fact("embedding_length")
    return getattr(transformers, _ARCHITECTURES[kind])(
        vocab_size=len(facts.get("tokenizer.ggml.tokens", ())), hidden_size=hidden,
        intermediate_size=fact("feed_forward_length"), num_hidden_layers=fact("block_count"), num_attention_heads=heads,
        num_key_value_heads=fact("attention.head_count_kv", heads),
        head_dim=fact("attention.key_length", hidden // heads), max_position_embeddings=fact("context_length"),
        rms_norm_eps=fact("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": fact("rope.freq_base", 10_000.0)},
        tie_word_embeddings="output.weight" not in tensors, bos_token_id=facts.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=facts.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"), dtype="float32",
    )  # fmt: skip


def _weights(gguf: Path, reader: Any, config: Any) -> dict[str, Any]:
    import torch
    from gguf.quants import dequantize

    found = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if name is None:
            raise UserError(
                f"{gguf} has a tensor that is not understood here, {tensor.name}. Give the model's own Hugging Face "
                "folder or name"
            )
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
        except (NotImplementedError, ValueError, KeyError) as error:
            raise UserError(f"{gguf}: {tensor.name} cannot be dequantised ({_first_line(error)})") from error
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # llama.cpp turns neighbouring rows of these by one angle, Hugging Face those half a head apart.
            weight = weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape).contiguous()
        found[name] = weight
    return found


def _name(name: str) -> str | None:
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _BLOCK:
        return None
    return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"


def _tokenizer(gguf: Path, facts: Mapping[str, Any]) -> tuple[Any, list[int]]:
    """The tokenizer, and the ids that end an answer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    kind, split = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise UserError(
            f"{gguf}: its tokenizer (`{kind}`, texts split as `{split}`) is not converted here (known: `gpt2` with "
            f"{', '.join(_SPLITS)}). Give the model's own Hugging Face folder or name"
        )
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "qwen2")
    if split == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    elif split == "qwen2":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), by_bytes])
    else:
        made.pre_tokenizer = by_bytes
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True)
               for token, of in zip(tokens, types, strict=True) if of == _CONTROL]  # fmt: skip
    made.add_special_tokens(special)
    made.add_tokens([AddedToken(token, normalized=False) for token, of in zip(tokens, types, strict=True)
                     if of == _USER_DEFINED])  # fmt: skip
    named = {
        "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }  # fmt: skip
    given = {word: tokens[facts[key]] for word, name in named.items() if (key := f"tokenizer.ggml.{name}") in facts}
    ends = sorted({facts[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot")
                   if f"tokenizer.ggml.{key}_token_id" in facts})  # fmt: skip
    if not ends:
        raise UserError(f"{gguf} does not say which token ends an answer (tokenizer.ggml.eos_token_id)")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **given)
    if template := facts.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    return tokenizer, ends


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
