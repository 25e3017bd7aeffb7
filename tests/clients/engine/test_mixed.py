"""`mixed`: the base's layers multiply in bfloat16, all else is float32; `fastest`: that, where it pays here."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.clients import tiny_engine as engine
from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.kernels import gemm
from untether.clients.engine.kernels.gemm import fastest
from untether.clients.engine.training import train
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec
from untether.sim.experiment import Experiment
from untether.sim.launch import arithmetic
from untether.sim.launch.arithmetic import settled
from untether.sim.launch.runtime import prepare, reopen


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the weights of its layers rounded to bfloat16, in float32."""
    model, head = copy.deepcopy(model), model.get_output_embeddings().weight
    for module_ in model.modules():
        if module_ is not model.get_output_embeddings() and type(module_).__name__ in ("Linear", "Conv1D"):
            module_.weight.data = module_.weight.data.bfloat16().float()
    assert torch.equal(model.get_output_embeddings().weight, head)
    return model


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_logits_are_those_of_rounded_weights_but_for_the_rounding_of_what_goes_in_and_out(kind):
    model, spec = engine.tiny_model(kind, torch.float32), LoraSpec(4, 8)
    base = FrozenBase(copy.deepcopy(model), mixed=True)
    state = engine.random_state(base, spec, 1)
    assert (base.dtype, base.arithmetic) == (torch.float32, "mixed")
    assert all(value.dtype == torch.float32 for value in state.values())
    stack = AdapterStack.of_states(base, [spec], [state])
    ids = torch.randint(3, engine.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), stack.active(stack.route([0], [1], 2)):
        logits = base.logits_at(torch.arange(24), ids, use_cache=False).view(2, 12, -1)
    oracle = engine.peft_model(rounded(model), spec, state)
    with torch.no_grad():
        worn = oracle(input_ids=ids[:1]).logits
        with oracle.disable_adapter():
            expected = torch.cat([worn, oracle(input_ids=ids[1:]).logits])
    apart = (logits - expected).abs().max() / expected.std()
    assert 0 < apart < 0.05, "of the sixteen bits that a float32 has more than a bfloat16"
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_follows_that_in_float32(kind):
    model = engine.tiny_model(kind, torch.float32)
    plain, mixed = FrozenBase(copy.deepcopy(model)), FrozenBase(copy.deepcopy(model), mixed=True)
    jobs = engine.mixed_jobs(plain)
    expected, found = train(plain, jobs), train(mixed, jobs)
    for job in jobs:
        own, others = found[job.key].losses, expected[job.key].losses
        assert own == pytest.approx(others, rel=0.03) and (not own or own != others)
        assert all(value.dtype == torch.float32 for value in found[job.key].state.values())


def test_the_output_layer_and_the_embedding_it_is_tied_to_stay_as_they_are():
    model = engine.tiny_model("llama", torch.float32)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    base = FrozenBase(model, mixed=True)
    assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert base.model.get_output_embeddings().weight.dtype == torch.float32
    assert {p.dtype for name, p in base.model.named_parameters() if "proj" in name} == {torch.bfloat16}


@pytest.mark.parametrize("gain, expected", [(1.0, "float32"), (1.1, "float32"), (1.8, "mixed")])
def test_fastest_is_what_products_were_measured_to_be(monkeypatch, gain, expected):
    monkeypatch.setattr(gemm, "bfloat16_gain", lambda: gain)
    assert fastest("cpu") == expected
    loaded = FrozenBase.load(resolve("embedded"), "fastest", "cpu")
    assert loaded.arithmetic.removeprefix("torch.") == expected


def test_a_run_keeps_what_was_measured_when_it_began(tmp_path, monkeypatch):
    asked = Experiment.read(None, {"model.dtype": "fastest", "engine.device": "cpu"})
    run = prepare(asked, tmp_path / "run")
    found = run.experiment.model.dtype
    assert found in ("float32", "mixed")
    other = {"float32": "mixed", "mixed": "float32"}[found]
    monkeypatch.setattr(arithmetic, "_measured", lambda device: other)
    assert reopen(run.path, asked).experiment.model.dtype == found, "on another machine, say"
    assert settled(asked).model.dtype == other
    with pytest.raises(UserError, match="model.dtype"):
        reopen(run.path, Experiment.read(None, {"model.dtype": other, "engine.device": "cpu"}))


def test_a_machine_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(arithmetic.sys, "executable", "/bin/false")
    arithmetic._measured.cache_clear()
    with pytest.raises(UserError, match='"fastest" could not be measured .* Give float32 or mixed'):
        settled(Experiment.read(None, {"model.dtype": "fastest"}))
