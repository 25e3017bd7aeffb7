"""The engine alone, by its public face: the example of docs/engine.md, held against PEFT."""

import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from untether.clients import engine
from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.sim.core.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(what examples/engine.py leaves, the folder that it wrote)"""
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path(str(ROOT / "examples/engine.py")), folder


def test_the_example_is_the_page(example):
    code = (ROOT / "examples/engine.py").read_text().split("\n", 2)[2]
    assert f"```python\n{code}```" in (ROOT / "docs/engine.md").read_text()


def test_each_adapter_learns_its_own(example):
    left, _ = example
    base, adapters, pairs = left["base"], left["adapters"], left["pairs"]
    asked = [(name, prompt) for name, own in pairs.items() for prompt, _ in own]
    said = engine.generate(base, adapters, asked, max_new_tokens=12)
    wanted = [answer for own in pairs.values() for _, answer in own]
    assert said == wanted
    one_by_one = [engine.generate(base, adapters, [row], max_new_tokens=12)[0] for row in asked[::3]]
    assert one_by_one == said[::3], "whoever is in the batch"
    assert all(len(adapter.losses) == 30 and adapter.losses[-1] < adapter.losses[0] for adapter in adapters.values())


def test_the_folders_give_the_same_logits_in_peft(example):
    left, folder = example
    base, adapters, pairs = left["base"], left["adapters"], left["pairs"]
    plain = AutoModelForCausalLM.from_pretrained(resolve("embedded"), dtype=torch.float32)
    for name, adapter in adapters.items():
        loaded = peft.PeftModel.from_pretrained(plain, folder / "adapters" / name).eval()
        prompt, answer = pairs[name][0]
        ids = torch.tensor([encode_prompt(base.tokenizer, prompt) + encode_answer(base.tokenizer, answer)])
        stack = AdapterStack.of_states(base, [adapter.spec], [dict(adapter.state)])
        with torch.no_grad(), stack.active(stack.route([0], [1], 1)):
            ours = base.logits_at(torch.arange(ids.shape[1]), ids, use_cache=False)
            theirs = loaded(input_ids=ids).logits[0]
        assert torch.allclose(ours, theirs, atol=1e-4)
        back = engine.load_peft(folder / "adapters" / name)
        assert all(torch.equal(back.state[key], value) for key, value in adapter.state.items())
        plain = loaded.unload()


def test_settings_and_shapes_by_name(example):
    base, pairs = example[0]["base"], example[0]["pairs"]
    made = engine.train_adapters(
        base, {name: pairs[name] for name in ("ann", "bea")}, {"ann": engine.TrainSettings(steps=2)},
        {"bea": engine.LoraSpec(2, target_modules=("q_proj",))},
    )  # fmt: skip
    assert len(made["ann"].losses) == 2 and made["ann"].spec == engine.LoraSpec()
    assert len(made["bea"].losses) == engine.TrainSettings().total_steps(len(pairs["bea"]))
    assert made["bea"].spec.rank == 2


def test_an_adapter_that_nobody_gave_is_refused(example):
    with pytest.raises(UserError, match="ann"):
        engine.generate(example[0]["base"], example[0]["adapters"], [("anne", "How was the phone? It was good.")])


def test_its_face_costs_no_torch():
    code = "import sys, untether.clients.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
