"""GGUF files as llama.cpp's own converter writes them, of models whose answers are known."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from untether.clients.base_model import FOLDER

KINDS = ("llama", "qwen2", "qwen3")
SPLITS = {"llama": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}
def original(kind: str):
    """The embedded model, or a small random one of another architecture with the same vocabulary."""
    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    sizes = {
        "vocab_size": 5120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,

        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "eos_token_id": 1, "pad_token_id": 0,
        "bos_token_id": None, "tie_word_embeddings": kind == "qwen3",
    }  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config((Qwen2Config if kind == "qwen2" else Qwen3Config)(**sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return made.eval()


def write(path, model, *, split: str, quantised: bool = False, rename=lambda name: name, facts=()) -> None:
    """A model as llama.cpp's own converter writes it."""
    config, kind = model.config, model.config.model_type
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, kind)
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if kind != "qwen2" else config.hidden_size // config.num_attention_heads)
    writer.add_value_length(config.hidden_size // config.num_attention_heads if kind == "qwen2" else config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if n in special else 1 for n in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template((FOLDER / "chat_template.jinja").read_text())
    for name, value in facts:
        writer.add_string(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = weight.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
        where = rename(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if quantised and data.ndim == 2:
            of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(where, gguf.quants.quantize(data, of), raw_dtype=of)
        else:
            writer.add_tensor(where, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
