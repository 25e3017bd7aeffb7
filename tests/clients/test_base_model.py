"""The embedded model: its size, its tokenizer, its card, that it knows the tasks, and that training can be resumed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from untether.clients.base_model import FOLDER, corpus
from untether.clients.base_model.corpus import batches, documents, encode
from untether.clients.base_model.pretrain import Recipe, held_out_loss, pretrain
from untether.clients.engine.encoding import decode_answer, encode_answer, encode_prompt
from untether.sim.core.errors import UserError
from untether.sim.core.seeding import generator
from untether.sim.population.tasks import get_task
from untether.sim.population.world import World


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_it_is_small_and_its_card_is_about_these_weights(model):
    weights = FOLDER / "model.safetensors"
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert sum(f.stat().st_size for f in FOLDER.iterdir() if f.is_file()) <= 10_000_000
    assert model.config.max_position_embeddings >= 1024
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_knows_the_tasks_and_no_user(model, tokenizer):
    losses = held_out_loss(model, tokenizer, seed=5, users=3)
    uniform = torch.log(torch.tensor(float(model.config.vocab_size))).item()
    assert all(0.02 < loss < 0.25 * uniform for loss in losses.values()), losses
    for name in ("LaMP_1", "LaMP_2", "LaMP_3"):
        task = get_task(name)
        for query in World(5).user(0, "validation", (name,), queries=4).queries:
            prompt = torch.tensor([encode_prompt(tokenizer, task.prompt(query.input))])
            written = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
            assert decode_answer(tokenizer, written.tolist()) in task.labels


def test_documents_follow_from_the_seed_and_show_pretraining_users_only():
    first, again, other = documents(3, 0, users=4), documents(3, 0, users=4), documents(3, 1, users=4)
    assert first == again != other
    user = World(3).user(0, "pretraining", history=(8, 8), queries=8)
    golds = {query.gold for query in user.queries if query.task == "LaMP_4"}
    assert golds <= {document.answer for document in first}


def test_encoding_is_what_a_device_encodes_and_batches_lose_nothing(tokenizer):
    found = documents(3, 0, users=4)
    encoded = encode(tokenizer, found)
    for document, row in zip(found, encoded, strict=True):
        prompt = encode_prompt(tokenizer, document.prompt)
        assert row.ids == prompt + encode_answer(tokenizer, document.answer)
        assert row.answer_at == len(prompt)
    made = list(batches(encoded, 2048, generator(0, "test")))
    assert sum(int(b.lengths.sum()) for b in made) == sum(len(row.ids) for row in encoded)
    assert sum(int(b.is_answer.sum()) for b in made) == sum(len(row.ids) - row.answer_at for row in encoded)
    assert all(b.ids.size <= 2048 or len(b.ids) == 1 for b in made)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, tokenizer, monkeypatch):
    from untether.clients.base_model import pretrain as module

    monkeypatch.setattr(corpus, "USERS_A_CHUNK", 4)
    monkeypatch.setattr(module, "held_out_loss", partial(held_out_loss, users=4))
    recipe = Recipe(7, 6, 512, 2, hidden=16, layers=1, heads=2, feed_forward=16, warmup=2)
    for folder in ("whole", "parts"):
        tokenizer.save_pretrained(tmp_path / folder)
    whole = pretrain(tmp_path / "whole", recipe=recipe, processes=1, say=lambda line: None)

    class Stop(Exception):
        pass

    def stop_after_saving(folder, *arguments):
        save(folder, *arguments)
        raise Stop

    save = module._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_save", stop_after_saving)
        with pytest.raises(Stop):
            pretrain(tmp_path / "parts", recipe=recipe, processes=1, save_every=3, say=lambda line: None)
    parts = pretrain(tmp_path / "parts", recipe=recipe, processes=1, say=lambda line: None)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (parts / "resume").exists()
    assert (
        hashlib.sha256((parts / "model.safetensors").read_bytes()).hexdigest() in (parts / "MODEL_CARD.md").read_text()
    )


def test_processes_must_share_a_step_evenly(tmp_path):
    with pytest.raises(UserError, match="processes = 3"):
        pretrain(tmp_path, recipe=replace(Recipe(), accumulate=4), processes=3)
