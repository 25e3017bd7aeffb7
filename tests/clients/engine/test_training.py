from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as tf

from tests.clients import tiny_engine as engine
from untether.clients.engine import training
from untether.clients.engine.jobs import Example, TrainJob, batch_plan
from untether.clients.engine.training import train
from untether.sim.core.learning import LoraSpec, TrainSettings


def job(key, examples=12, **settings) -> TrainJob:
    settings = {"steps": 4, "batch_size": 4, **settings}
    return TrainJob(key, engine.random_examples(key, examples), TrainSettings(**settings), LoraSpec(2), seed=key)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers_without_the_step_that_trains_nothing(schedule):
    settings, total = TrainSettings(0.5, schedule=schedule, warmup_ratio=0.25), 13
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = tf.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule, optimizer, math.ceil(0.25 * total) + 1,
        total + 1,
    )
    assert theirs.get_last_lr() == [0.0]
    optimizer.step()
    theirs.step()
    for step in range(total):
        assert settings.rate_at(step, total) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_steps_follow_epochs_unless_given():
    assert TrainSettings(epochs=3, batch_size=8).total_steps(17) == 9
    assert TrainSettings(epochs=0.5, batch_size=8).total_steps(17) == 2
    assert TrainSettings(epochs=3, steps=5).total_steps(17) == 5


def test_every_epoch_reads_every_example_once():
    made = job(3, examples=10, steps=0, epochs=4, batch_size=4)
    plan = batch_plan(made)
    assert len(plan) == 12
    epochs = [sorted(sum(plan[start : start + 3], [])) for start in range(0, 12, 3)]
    assert epochs == [list(range(10))] * 4
    assert plan[:3] != plan[3:6]
    assert plan == batch_plan(made)


def test_batches_bring_similar_lengths_together():
    examples = [Example([5] * n, [6]) for n in np.random.default_rng(0).integers(5, 400, 64)]
    plan = batch_plan(TrainJob(0, examples, TrainSettings(epochs=1, batch_size=8)))
    widths = [[len(examples[i].prompt_ids) + 1 for i in batch] for batch in plan]
    padded, real = sum(8 * max(batch) for batch in widths), sum(map(sum, widths))
    assert padded < 1.2 * real


def test_a_finished_job_leaves_and_a_waiting_one_takes_its_place():
    base, _ = engine.tiny_base("llama", torch.float32)
    jobs = [job(k, steps=steps) for k, steps in enumerate([1, 5, 2, 3, 4])]
    seen = []
    results = train(base, jobs, max_cohort=2, progress=lambda done, total: seen.append((done, total)))
    assert [results[k].steps for k in range(5)] == [1, 5, 2, 3, 4]
    assert list(results) == [0, 1, 2, 3, 4]
    assert seen[-1] == (15, 15)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for made in jobs:
        assert results[made.key].learning_rates[-1] == made.settings.rate_at(made.total_steps - 1, made.total_steps)


def test_jobs_without_examples_keep_their_adapter():
    base, _ = engine.tiny_base("llama", torch.float32)
    state = engine.random_state(base, LoraSpec(2), 1)
    result = train(base, [TrainJob("idle", [], spec=LoraSpec(2), state=state)])["idle"]
    assert result.steps == result.tokens == 0
    assert all(torch.equal(result.state[key], state[key]) for key in state)
    assert train(base, []) == {}


def test_two_jobs_of_one_key_are_refused():
    base, _ = engine.tiny_base("llama", torch.float32)
    with pytest.raises(ValueError, match="same key"):
        train(base, [job(1), job(1)])


def test_tokens_count_prompts_and_targets_but_no_padding():
    base, _ = engine.tiny_base("llama", torch.float32)
    examples = [Example([5] * 4, [6, 1]), Example([5] * 9, [6, 7, 1])]
    result = train(base, [TrainJob(0, examples, TrainSettings(steps=2, batch_size=2), LoraSpec(2))])[0]
    assert result.tokens_by_step == [5 + 11] * 2


def test_long_examples_are_cut_to_the_context():
    base, _ = engine.tiny_base("gpt2", torch.float32)
    examples = [Example([5] * 500, [6, 1]), Example([5] * 3, [7] * 400)]
    result = train(base, [TrainJob(0, examples, TrainSettings(steps=1, batch_size=2), LoraSpec(2))])[0]
    assert result.tokens_by_step[0] <= 2 * base.context_length
    assert math.isfinite(result.losses[0])


class Scarce:
    """A pass over more than `room` rows runs out of memory."""

    def __init__(self, monkeypatch, room: int):
        self.refused = self.passes = 0
        plain = training._Engine._gradients

        def gradients(engine_, shares):
            if sum(len(share.places()) for share in shares) > room:
                self.refused += 1
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")
            self.passes += 1
            return plain(engine_, shares)

        monkeypatch.setattr(training._Engine, "_gradients", gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("room", [4, 1])
def test_running_out_of_memory_splits_the_pass_and_changes_nothing(monkeypatch, room, dropout):
    base, _ = engine.tiny_base("llama")
    jobs = [job(k) for k in range(5)]
    for made in jobs:
        made.spec = LoraSpec(2, dropout=dropout)
    plenty = train(base, jobs)
    scarce = Scarce(monkeypatch, room)
    results = train(base, jobs)
    assert scarce.refused
    for made in jobs:
        assert results[made.key].outcome == "ok"
        assert engine.largest_difference(results[made.key].state, plenty[made.key].state) < 1e-9


def test_passes_stay_as_large_as_what_fitted_after_memory_ran_out(monkeypatch):
    """Not so much smaller that every adapter is a pass of its own: halves of a pass fail one after the other."""
    base, _ = engine.tiny_base("llama", torch.float32)
    jobs = [TrainJob(k, [Example([5] * 9, [6, 1])] * 2, TrainSettings(steps=3, batch_size=1), LoraSpec(2), k)
            for k in range(32)]  # fmt: skip
    scarce = Scarce(monkeypatch, room=4)
    train(base, jobs)
    assert scarce.refused == 1 + 2 + 4, "in the first turn alone"
    assert scarce.passes == 3 * 32 / 4


def test_a_job_that_never_fits_is_marked_and_the_others_go_on(monkeypatch):
    base, _ = engine.tiny_base("llama", torch.float32)
    plain = training._Engine._gradients

    def gradients(engine_, shares):
        if any(share.run.job.key == 2 for share in shares):
            raise MemoryError
        return plain(engine_, shares)

    monkeypatch.setattr(training._Engine, "_gradients", gradients)
    results = train(base, [job(k) for k in range(4)])
    assert [results[k].outcome for k in range(4)] == ["ok", "ok", "out_of_memory", "ok"]
    assert [results[k].steps for k in range(4)] == [4, 4, 0, 4]


def test_running_out_of_memory_for_the_cohort_halves_it(monkeypatch):
    base, _ = engine.tiny_base("llama", torch.float32)
    sizes = []
    plain = training.CohortAdamW

    def optimizer(flat):
        sizes.append(len(flat))
        if len(flat) > 2:
            raise MemoryError
        return plain(flat)

    monkeypatch.setattr(training, "CohortAdamW", optimizer)
    results = train(base, [job(k) for k in range(6)])
    assert sizes == [6, 3, 1]
    assert all(result.steps == 4 for result in results.values())


def test_the_memory_budget_bounds_the_cohort(monkeypatch):
    base, _ = engine.tiny_base("llama", torch.float32)
    sizes = []
    plain = training.CohortAdamW
    monkeypatch.setattr(training, "CohortAdamW", lambda flat: sizes.append(len(flat)) or plain(flat))
    bytes_each = training.AdapterStack(base, [LoraSpec(2)]).bytes_per_adapter
    train(base, [job(k, steps=1) for k in range(6)], memory_bytes=4 * bytes_each, pass_tokens=1)
    train(base, [job(k, steps=1) for k in range(6)], memory_bytes=1 << 30)
    assert 1 <= sizes[0] < 6 == sizes[1]


def test_other_errors_are_not_swallowed(monkeypatch):
    base, _ = engine.tiny_base("llama", torch.float32)
    monkeypatch.setattr(training._Engine, "_gradients", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(base, [job(0)])
