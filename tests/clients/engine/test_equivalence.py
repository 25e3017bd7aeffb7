"""The engine against separate peft runs, in float64, to 1e-9: the project's claim that stacking changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.clients import tiny_engine as engine
from untether.clients.engine import training
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.generation import GenerationRow, generate, label_scores
from untether.clients.engine.training import Trainable, TrainJob, train
from untether.sim.core.learning import LoraSpec, TrainSettings

TOLERANCE = 1e-9


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_logits_of_mixed_rows_equal_peft(kind):
    base, model = engine.tiny_base(kind)
    specs = [LoraSpec(2, 8), LoraSpec(5, 16, use_rslora=True)]
    states = [engine.random_state(base, spec, k) for k, spec in enumerate(specs)]
    stack = AdapterStack.of_states(base, specs, states)
    ids = torch.randint(3, engine.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), stack.active(stack.route([1, 0], [1, 2], 4)):
        logits = base.logits_at(torch.arange(36), ids, use_cache=False).view(4, 9, -1)
    expected = [engine.peft_model(model, specs[k], states[k]) for k in (1, 0, 0)] + [model]
    for row, reference in enumerate(expected):
        with torch.no_grad():
            one = reference(input_ids=ids[row : row + 1]).logits[0]
        assert (logits[row] - one).abs().max() < TOLERANCE
    assert (logits[1] - model(input_ids=ids[1:2]).logits[0]).abs().max() > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_gradients_equal_peft(kind):
    base, model = engine.tiny_base(kind)
    spec, examples = LoraSpec(3, 8), engine.random_examples(3, 4)
    state = engine.random_state(base, spec, 3)
    wrapped = engine.peft_model(model, spec, state)
    engine.peft_loss(wrapped, examples).backward()
    rate = 1e-3
    # One step of Adam with beta1 = beta2 = 0 and a huge eps moves each weight by -rate * gradient / eps.
    eps = 1e9
    settings = TrainSettings(
        rate * eps, steps=1, batch_size=4, schedule="constant", warmup_ratio=0, weight_decay=0, betas=(0.0, 0.0),
        max_grad_norm=1e9, eps=eps,
    )  # fmt: skip
    after = train(base, [TrainJob("a", examples, settings, spec, state=state)])["a"].state
    for key, before in state.items():
        name = key.replace(".weight", ".default.weight")
        gradient = dict(wrapped.named_parameters())[name].grad
        assert ((before - after[key]) / rate - gradient).abs().max() < TOLERANCE * 100
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_trajectories_equal_separate_peft_runs(kind):
    base, model = engine.tiny_base(kind)
    jobs = engine.mixed_jobs(base)
    results = train(base, jobs, max_cohort=3, pass_tokens=200)
    for job in jobs:
        state, losses = engine.peft_run(model, job)
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
        assert results[job.key].losses == pytest.approx(losses, abs=10 * TOLERANCE)  # sums over many weights
        assert engine.largest_difference(state, job.state) > 1e-3


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_a_common_beginning_is_computed_once_and_changes_nothing(kind, short, monkeypatch):
    base, model = engine.tiny_base(kind)
    if not short:
        monkeypatch.setattr("untether.clients.engine.decoder._SHORT", 0)
    spec, settings = LoraSpec(4, 8), TrainSettings(5e-3, steps=4, batch_size=4)
    jobs = [
        TrainJob(k, engine.random_examples(k, 6, shared), settings, spec, k, state=engine.random_state(base, spec, k))
        for k, shared in enumerate((24, 24, 9, 1))
    ]  # fmt: skip
    prefixes = engine.prefixes_of(training, monkeypatch)
    results = train(base, jobs, pass_tokens=400)
    for job in jobs:
        state, losses = engine.peft_run(model, job)
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
        assert results[job.key].losses == pytest.approx(losses, abs=TOLERANCE)
    if base.lean is not None:
        assert set(prefixes) >= {9, 24}


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_a_batch_of_several_tasks_changes_nothing(short, monkeypatch):
    base, model = engine.tiny_base("llama")
    if not short:
        monkeypatch.setattr("untether.clients.engine.decoder._SHORT", 0)
    spec, settings = LoraSpec(4, 8), TrainSettings(5e-3, steps=6, batch_size=8)
    jobs = []
    for k in range(3):
        tasks = [engine.random_examples(10 * k + task, 4, shared=12 + 12 * task) for task in range(3)]
        examples = [example for task in tasks for example in task]
        jobs.append(TrainJob(k, examples, settings, spec, k, state=engine.random_state(base, spec, k)))
    prefixes = engine.prefixes_of(training, monkeypatch)
    results = train(base, jobs, pass_tokens=300)
    assert {12, 24, 36} <= set(prefixes)
    for job in jobs:
        state, losses = engine.peft_run(model, job)
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
        assert results[job.key].losses == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("up_proj",), ("lm_head", "o_proj")]
)
def test_trajectories_with_other_targets(targets):
    base, model = engine.tiny_base("llama")
    spec = LoraSpec(4, 8, target_modules=targets)
    others = engine.mixed_jobs(base)[:2]
    job = TrainJob(
        "odd", engine.random_examples(9, 7), TrainSettings(5e-3, steps=6, batch_size=3), spec, 9,
        state=engine.random_state(base, spec, 9),
    )  # fmt: skip
    result = train(base, [*others, job])["odd"]
    state, losses = engine.peft_run(model, job)
    assert engine.largest_difference(state, result.state) < TOLERANCE
    assert result.losses == pytest.approx(losses, abs=TOLERANCE)


def test_regex_targets_and_layer_zero_left_out():
    base, model = engine.tiny_base("qwen2")
    spec = LoraSpec(4, 8, target_modules=r".*\.1\.mlp\.(gate|down)_proj")
    job = TrainJob(
        "top", engine.random_examples(4, 6), TrainSettings(5e-3, steps=5, batch_size=3), spec, 4,
        state=engine.random_state(base, spec, 4),
    )  # fmt: skip
    assert all(".layers.1.mlp." in key for key in job.state)
    state, _ = engine.peft_run(model, job)
    assert engine.largest_difference(state, train(base, [job])["top"].state) < TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_company_changes_nothing(dropout):
    base, _ = engine.tiny_base("llama")
    jobs = engine.mixed_jobs(base)
    for job in jobs:
        job.spec = LoraSpec(job.spec.rank, job.spec.alpha, dropout, use_rslora=job.spec.use_rslora)
    together = train(base, jobs)
    permuted = train(base, jobs[::-1], max_cohort=2, pass_tokens=64)
    for job in jobs:
        alone = train(base, [job])[job.key]
        for other in (together[job.key], permuted[job.key]):
            assert engine.largest_difference(alone.state, other.state) < TOLERANCE
            assert alone.losses == pytest.approx(other.losses, abs=TOLERANCE)
            assert alone.learning_rates == other.learning_rates
            assert alone.tokens_by_step == other.tokens_by_step


def test_rank_padding_stays_zero():
    base, _ = engine.tiny_base("llama")
    specs = [LoraSpec(2), LoraSpec(8)]
    stack = AdapterStack.create(base, specs, [0, 1])
    seen = []

    class Watched(AdapterStack):
        def state(self, k):
            name = next(iter(self.layout.targets))
            rank = self.specs[k].rank
            row = self.flat[k : k + 1]
            seen.append(
                (rank, self.layout.A(row, name)[0, rank:].abs().sum() + self.layout.B(row, name)[0, rank:].abs().sum())
            )
            return super().state(k)

    original, training.AdapterStack = training.AdapterStack, Watched
    try:
        train(base, [
            TrainJob(k, engine.random_examples(k, 4), TrainSettings(1e-2, steps=5), specs[k], k, state=stack.state(k))
            for k in range(2)
        ])  # fmt: skip
    finally:
        training.AdapterStack = original
    assert {rank for rank, _ in seen} == {2, 8}
    assert all(total == 0 for _, total in seen)


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_greedy_decoding_and_label_scores_equal_peft(kind):
    base, model = engine.tiny_base(kind)
    specs = [LoraSpec(2, 8), LoraSpec(5, 16)]
    states = [engine.random_state(base, spec, k) for k, spec in enumerate(specs)]
    stack = AdapterStack.of_states(base, specs, states)
    reference = {0: engine.peft_model(model, specs[0], states[0]), 1: engine.peft_model(model, specs[1], states[1])}
    reference[None] = model
    draw = np.random.default_rng(1)
    rows = [
        GenerationRow(draw.integers(3, engine.VOCABULARY, int(draw.integers(2, 40))).tolist(), [0, 1, None][k % 3])
        for k in range(10)
    ]
    limits = [int(draw.integers(0, 10)) for _ in rows]
    labels = [[draw.integers(3, engine.VOCABULARY, n).tolist() for n in (1, 3, 2)] for _ in rows]
    answers = generate(base, stack, rows, max_new_tokens=limits, batch_size=4)
    scores = label_scores(base, stack, rows, labels, batch_size=12)
    assert any(answers)
    for row, limit, answer, of_row, found in zip(rows, limits, answers, labels, scores, strict=True):
        prompt, alone = torch.tensor([row.prompt_ids]), reference[row.adapter]
        with torch.no_grad():
            expected = []
            if limit:
                whole = alone.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False,
                    pad_token_id=engine.PAD, eos_token_id=engine.END,
                )[0, prompt.shape[1] :].tolist()  # fmt: skip
                expected = whole[: whole.index(engine.END)] if engine.END in whole else whole
            assert answer == expected
            for label, value in zip(of_row, found, strict=True):
                logits = alone(input_ids=torch.tensor([[*row.prompt_ids, *label]])).logits[0]
                steps = torch.log_softmax(logits, -1)[prompt.shape[1] - 1 : -1]
                assert sum(steps[t, token].item() for t, token in enumerate(label)) == pytest.approx(
                    value, abs=TOLERANCE
                )


def test_bfloat16_base_with_float32_adapters_casts_like_peft():
    base, model = engine.tiny_base("llama", torch.bfloat16)
    spec = LoraSpec(4, 8)
    state = engine.random_state(base, spec, 1)
    assert all(value.dtype == torch.float32 for value in state.values())
    stack = AdapterStack.of_states(base, [spec], [state])
    wrapped = engine.peft_model(model, spec, state).base_model.model
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = state["base_model.model." + name.replace(".default", "")]
    ids = torch.randint(3, engine.VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), stack.active(stack.route([0], [1], 1)):
        logits = base.logits_at(torch.arange(12), ids, use_cache=False)
        expected = wrapped(input_ids=ids).logits[0]
    assert (logits.float() - expected.float()).abs().max() < 0.1
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "frozen"), [("llama", "A"), ("gpt2", "B")])
def test_a_frozen_side_is_a_frozen_parameter_of_peft(kind, frozen):
    base, model = engine.tiny_base(kind)
    others = engine.mixed_jobs(base)
    for job in others[:2]:
        rank = job.spec.rank
        sides = {side: (side != frozen,) * rank for side in "AB"}
        job.trainable, job.settings = Trainable(**sides), replace(job.settings, weight_decay=0.1)
    results = train(base, others)
    for job in others:
        state, losses = engine.peft_run(model, job)
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
        assert results[job.key].losses == pytest.approx(losses, abs=TOLERANCE)
    for key, before in others[0].state.items():
        moved = not torch.equal(before, results[0].state[key])
        assert moved == (f"lora_{frozen}" not in key)


def test_frozen_ranks_are_an_adapter_that_was_merged_into_the_base():
    base, model = engine.tiny_base("llama")
    below, own = LoraSpec(3, 6), LoraSpec(2, 4)  # one scaling
    states = engine.random_state(base, below, 1), engine.random_state(base, own, 2)
    both = {
        key: torch.cat([states[0][key], states[1][key]], dim=0 if "lora_A" in key else 1) for key in states[0]
    }  # fmt: skip
    settings = TrainSettings(5e-3, steps=8, batch_size=3, weight_decay=0.1)
    moves = (False,) * 3 + (True,) * 2
    job = TrainJob("on", engine.random_examples(1, 7), settings, LoraSpec(5, 10), 1, state=both)
    job.trainable = Trainable(moves, moves)
    found = train(base, [job])["on"]
    merged = engine.peft_model(model, below, states[0]).merge_and_unload()
    alone = TrainJob("on", job.examples, settings, own, 1, state=states[1])
    state, losses = engine.peft_run(merged, alone)
    for key, value in found.state.items():
        cut = value.split((3, 2), dim=0 if "lora_A" in key else 1)
        assert torch.equal(cut[0], states[0][key])
        assert (cut[1] - state[key]).abs().max() < TOLERANCE
    assert found.losses == pytest.approx(losses, abs=TOLERANCE)


def test_a_proximal_term_is_that_of_fedprox():
    base, model = engine.tiny_base("llama")
    jobs = engine.mixed_jobs(base)[:2]
    jobs[1].proximal_mu = 0.7
    results = train(base, jobs)
    for job in jobs:
        state, _ = engine.peft_run(model, job)
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
