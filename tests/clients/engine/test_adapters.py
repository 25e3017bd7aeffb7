from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients import tiny_engine as engine
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.door.peft_format import load_peft, peft_config, save_peft, target_names
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_exported_adapter_gives_the_same_logits_in_peft(kind, tmp_path):
    model = engine.tiny_model(kind, torch.float32)
    model.save_pretrained(tmp_path / "base")
    base = FrozenBase(model)
    spec = LoraSpec(4, 12, use_rslora=True)
    state = engine.random_state(base, spec, 5)
    stack = AdapterStack.of_states(base, [LoraSpec(8), spec], [engine.random_state(base, LoraSpec(8), 1), state])
    stack.save_peft(1, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    theirs = peft.get_peft_model_state_dict(loaded)
    assert set(theirs) == set(state)
    assert all(torch.equal(theirs[key], state[key]) for key in state), "bit for bit"
    ids = torch.randint(3, engine.VOCABULARY, (2, 7))
    with torch.no_grad(), stack.active(stack.route([1], [2], 2)):
        ours = base.logits_at(torch.arange(14), ids, use_cache=False)
        expected = loaded(input_ids=ids).logits.flatten(0, 1)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_folder_comes_back_bit_for_bit(tmp_path):
    base, _ = engine.tiny_base("qwen2", torch.float32)
    spec = LoraSpec(3, 7.5, 0.1, ("q_proj", "down_proj"))
    state = engine.random_state(base, spec, 2)
    save_peft(tmp_path, spec, state, base)
    back, loaded = load_peft(tmp_path)
    assert back == spec
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    first = (tmp_path / "adapter_config.json").read_bytes()
    save_peft(tmp_path, spec, state, base)
    assert (tmp_path / "adapter_config.json").read_bytes() == first


def test_a_folder_made_by_peft_loads(tmp_path):
    base, model = engine.tiny_base("llama", torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"]))
    wrapped.save_pretrained(tmp_path)
    stack = AdapterStack(base, [LoraSpec(6)])
    stack.load_peft(0, tmp_path)
    theirs = peft.get_peft_model_state_dict(wrapped)
    assert stack.specs[0].rank == 4
    assert all(torch.equal(stack.state(0)[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "field, value", [("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all"), ("peft_type", "IA3")]
)
def test_what_the_stack_cannot_do_is_refused(tmp_path, field, value):
    base, _ = engine.tiny_base("llama", torch.float32)
    spec = LoraSpec(2)
    save_peft(tmp_path, spec, engine.random_state(base, spec, 0), base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match="adapter_config.json"):
        load_peft(tmp_path)


def test_initialisation_is_pefts_and_each_adapters_own():
    base, _ = engine.tiny_base("llama", torch.float32)
    specs = [LoraSpec(4), LoraSpec(16), LoraSpec(2)]
    together = AdapterStack.create(base, specs, [7, 8, 9])
    alone = AdapterStack.create(base, specs[1:2], [8])
    for key, value in alone.state(0).items():
        assert torch.equal(value, together.state(1)[key])
        if "lora_B" in key:
            assert not value.any()
        else:
            # kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(inputs).
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_targets_are_those_of_peft():
    base, model = engine.tiny_base("phi3", torch.float32)
    for targets in ("all-linear", ("qkv_proj",), ("o_proj", "gate_up_proj"), r".*layers\.1\..*down_proj"):
        spec = LoraSpec(2, target_modules=targets)
        wrapped = peft.get_peft_model(engine.tiny_model("phi3"), peft_config(spec))
        expected = [n for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert list(target_names(base, spec)) == expected


@pytest.mark.parametrize("targets", [("no_such_proj",), ("embed_tokens",)])
def test_impossible_targets_are_the_users_mistake(targets):
    base, _ = engine.tiny_base("llama", torch.float32)
    with pytest.raises(UserError, match="target_modules"):
        AdapterStack(base, [LoraSpec(2, target_modules=targets)])


def test_foreign_states_are_refused():
    base, _ = engine.tiny_base("llama", torch.float32)
    stack = AdapterStack(base, [LoraSpec(4)])
    state = engine.random_state(base, LoraSpec(2), 0)
    with pytest.raises(UserError, match="rank 4"):
        stack.load(0, state)
    with pytest.raises(UserError, match="lacks"):
        stack.load(0, dict(list(state.items())[1:]))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}])
def test_specs_are_checked(wrong):
    with pytest.raises(UserError):
        LoraSpec(**wrong)


def test_unknown_model_device_and_dtype_are_the_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        FrozenBase.load(str(tmp_path))
    with pytest.raises(UserError, match="dtype"):
        FrozenBase.load(str(tmp_path), dtype="int3")
    with pytest.raises(UserError, match="device"):
        FrozenBase.load(str(tmp_path), device="abacus")


def test_fingerprint_follows_the_weights():
    one, same = engine.tiny_base("llama")[0], engine.tiny_base("llama")[0]
    other = engine.tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert one.fingerprint == same.fingerprint != FrozenBase(other).fingerprint
