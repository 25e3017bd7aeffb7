from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.clients import tiny_engine as engine
from untether.clients.engine import generation, reading
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.generation import GenerationRow, generate, label_scores
from untether.sim.core.learning import LoraSpec


@pytest.fixture(scope="module")
def world():
    base, _ = engine.tiny_base("llama")
    specs = [LoraSpec(2, 8), LoraSpec(4, 16)]
    stack = AdapterStack.of_states(base, specs, [engine.random_state(base, s, k) for k, s in enumerate(specs)])
    draw = np.random.default_rng(3)
    rows = [
        GenerationRow(draw.integers(3, engine.VOCABULARY, int(draw.integers(2, 30))).tolist(), (0, None, 1)[k % 3])
        for k in range(9)
    ]
    return base, stack, rows


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_rows_answer_does_not_depend_on_its_company(world, temperature):
    base, stack, rows = world
    options = {"max_new_tokens": 9, "temperature": temperature}
    together = generate(base, stack, rows, seeds=range(9), **options)
    small = generate(base, stack, rows, seeds=range(9), batch_size=2, **options)
    alone = [generate(base, stack, [row], seeds=[seed], **options)[0] for seed, row in enumerate(rows)]
    assert together == small == alone
    assert len({tuple(answer) for answer in together}) > 1


def test_sampling_draws_from_the_models_distribution(world):
    base, _, _ = world
    prompt = [5, 9, 11]
    rows = [GenerationRow(prompt)] * 4000
    first = [answer[0] if answer else engine.END for answer in generate(
        base, None, rows, max_new_tokens=1, temperature=2.0, seeds=range(4000)
    )]  # fmt: skip
    with torch.no_grad():
        logits = base.logits_at(torch.tensor([2]), torch.tensor([prompt]), use_cache=False)[0]
    expected = torch.softmax(logits / 2.0, -1).numpy()
    found = np.bincount(first, minlength=engine.VOCABULARY) / 4000
    assert np.abs(found - expected).sum() < 0.15


def test_sampling_without_seeds_is_refused(world):
    base, _, rows = world
    with pytest.raises(ValueError, match="seed"):
        generate(base, None, [GenerationRow(rows[0].prompt_ids)], max_new_tokens=2, temperature=1.0)


def test_limits_are_each_rows_own_and_the_end_is_not_returned(world):
    base, stack, rows = world
    answers = generate(base, stack, rows, max_new_tokens=list(range(9)))
    assert all(len(answer) <= limit for limit, answer in enumerate(answers))
    assert not any(engine.END in answer for answer in answers)
    assert answers[0] == []


def test_long_prompts_are_cut_to_leave_room(world):
    base, _, _ = world
    answer = generate(base, None, [GenerationRow([7] * 500)], max_new_tokens=20)[0]
    assert len(answer) <= 20


def test_progress_counts_rows(world):
    base, stack, rows = world
    seen = []
    generate(base, stack, rows, max_new_tokens=2, batch_size=4, progress=lambda *now: seen.append(now))
    assert seen == [(4, 9), (5, 9), (9, 9)]  # batches of 4, 4 and 1: the longest, the shortest, then what is between


def test_label_scores_normalised_by_length(world):
    base, stack, rows = world
    labels = [[[5, 6, 7], [8]]] * len(rows)
    plain = label_scores(base, stack, rows, labels)
    mean = label_scores(base, stack, rows, labels, normalize=True)
    for (long, short), (long_mean, short_mean) in zip(plain, mean, strict=True):
        assert long_mean == pytest.approx(long / 3)
        assert short_mean == short
    assert label_scores(base, stack, rows[:2], [[], [[4]]])[0] == []


def test_running_out_of_memory_halves_the_batch(world, monkeypatch):
    base, stack, rows = world
    expected = generate(base, stack, rows, max_new_tokens=5)
    plain, refused = reading.ReadPrompts.__init__, []

    def scarce(self, base_, stack_, rows_, room):
        if len(rows_) > 2:
            refused.append(len(rows_))
            raise MemoryError
        plain(self, base_, stack_, rows_, room)

    monkeypatch.setattr(reading.ReadPrompts, "__init__", scarce)
    assert generate(base, stack, rows, max_new_tokens=5) == expected
    assert refused


def test_long_prompts_come_in_smaller_batches(world, monkeypatch):
    base, _, _ = world
    sizes, plain = [], reading.ReadPrompts.__init__

    def watched(self, base_, stack_, rows_, room):
        sizes.append((len(rows_), max(len(row.prompt_ids) for row in rows_) + room))
        plain(self, base_, stack_, rows_, room)

    monkeypatch.setattr(reading.ReadPrompts, "__init__", watched)
    monkeypatch.setitem(generation.BATCH_TOKENS, "cpu", 200)
    generate(base, None, [GenerationRow([7] * length) for length in (5, 60, 61, 62, 63, 6, 7, 8)], max_new_tokens=4)
    assert sum(rows for rows, _ in sizes) == 8
    assert all(rows * tokens <= 200 for rows, tokens in sizes)
    assert [rows for rows, _ in sizes] == [3, 3, 2]
    assert sizes[0][1] > 60 and sizes[1][1] < 20, "the longest, then the shortest"


@pytest.mark.parametrize("kind", [kind for kind in engine.ARCHITECTURES if kind != "gpt2"])
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(kind, short, monkeypatch):
    base, _ = engine.tiny_base(kind)
    if not short:
        monkeypatch.setattr("untether.clients.engine.decoder._SHORT", 0)
    specs = [LoraSpec(2, 8), LoraSpec(4, 16)]
    stack = AdapterStack.of_states(base, specs, [engine.random_state(base, s, k) for k, s in enumerate(specs)])
    draw = np.random.default_rng(5)
    instructions = [draw.integers(3, engine.VOCABULARY, 40).tolist() for _ in range(2)]
    own_part = [draw.integers(3, engine.VOCABULARY, 2 + k % 5).tolist() for k in range(24)]
    rows = [GenerationRow(instructions[k % 2] + part, (0, None, 1)[k % 3]) for k, part in enumerate(own_part)]
    labels = [[[5, 6, 7], [8]]] * len(rows)
    prefixes = engine.prefixes_of(reading, monkeypatch)
    together = generate(base, stack, rows, max_new_tokens=6)
    scores = label_scores(base, stack, rows, labels)
    assert set(prefixes) == {40}
    prefixes.clear()
    assert together == [generate(base, stack, [row], max_new_tokens=6)[0] for row in rows]
    assert set(prefixes) == {0} and len({tuple(answer) for answer in together}) > 1
    prefixes.clear()
    for row, of_row, found in zip(rows, labels, scores, strict=True):
        assert found == pytest.approx(label_scores(base, stack, [row], [of_row])[0], abs=1e-9)
    shared = {len(row.prompt_ids) - 1 for row in rows}  # one of a row's texts is its prompt: the last token is its own
    assert set(prefixes) == (shared if short else {0}), "a prompt is read once for all its labels"


def test_an_adapter_with_far_more_to_read_reads_in_several_rows(monkeypatch):
    base, _ = engine.tiny_base("llama")
    specs = [LoraSpec(2, 8), LoraSpec(4, 16)]
    stack = AdapterStack.of_states(base, specs, [engine.random_state(base, s, k) for k, s in enumerate(specs)])
    draw = np.random.default_rng(6)
    wearers = [0] * 20 + [1] * 2 + [None] * 3
    rows = [GenerationRow(draw.integers(3, engine.VOCABULARY, 12).tolist(), wearer) for wearer in wearers]
    packed, plain = [], reading.pack
    monkeypatch.setattr(reading, "pack", lambda rows, *inputs: packed.append(len(rows)) or plain(rows, *inputs))
    together = generate(base, stack, rows, max_new_tokens=6)
    assert packed[0] > 3
    assert together == [generate(base, stack, [row], max_new_tokens=6)[0] for row in rows]
    assert len({tuple(answer) for answer in together}) > 1
