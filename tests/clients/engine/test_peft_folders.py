"""Adapters' folders as people have them: cut, of another kind, made by another program."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.clients.tiny_engine import tiny_base
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.door.peft_format import load_peft
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def stack():
    return AdapterStack.create(tiny_base("llama")[0], [LoraSpec(rank=2, target_modules=("q_proj",))], [1])


@pytest.fixture
def folder(stack, tmp_path):
    stack.save_peft(0, tmp_path)
    assert load_peft(tmp_path)[0].rank == 2
    return tmp_path


def reweigh(change):
    def damage(folder):
        file = folder / WEIGHTS
        save_file({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, file)

    return damage


def wrote(text):
    return lambda folder: (folder / CONFIG).write_text(text)


def said(**fields):
    return lambda folder: (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), **fields})
    )


DAMAGES = {
    "a list": (wrote("[1]"), "peft_type 'None'"), "null": (wrote("null"), "peft_type 'None'"),
    "nested": (wrote("[" * 5000), "not a PEFT adapter folder"), "no JSON": (wrote("{"), "not a PEFT adapter folder"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "not a PEFT adapter folder"),
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), "not a PEFT adapter folder"),
    "a rank that is no whole number": (said(r=2.0), "r = 2.0"), "a rank of truth": (said(r=True), "r = True"),
    "another rank": (said(r=10**9), "is of rank 2, and adapter_config.json says r = 1000000000"),
    "an alpha of text": (said(lora_alpha="x"), "not LoRA's"), "no number": (said(lora_alpha=float("nan")), "NaN"),
    "rsLoRA of text": (said(use_rslora="yes"), "use_rslora = 'yes'"),
    "a broken pattern": (said(target_modules="(("), "target_modules are not LoRA's"),
    "a pattern of numbers": (said(target_modules=5), "not LoRA's"),
    "whole numbers": (reweigh(lambda tensor: tensor.to(torch.int32)), "is torch.int32"),
    "eight bits": (reweigh(lambda tensor: tensor.to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn"),
    "no numbers": (reweigh(lambda tensor: tensor * float("nan")), "no numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_a_sentence_that_names_it(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_peft(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read(stack, folder, dtype):
    reweigh(lambda tensor: tensor.to(dtype))(folder)
    stack.load_peft(0, folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensor: tensor[:, :1], "rank 2 needs"), (lambda tensor: tensor.flatten()[None], "is of rank 1"),
])  # fmt: skip
def test_weights_of_another_shape_are_refused(stack, folder, change, words):
    reweigh(change)(folder)
    with pytest.raises(UserError, match=words):
        stack.load_peft(0, folder)
