"""The engine on a GPU, against separate peft runs on that GPU; skipped where there is none.

(Not against the CPU: transformers turns by angles in float32, of which the two round the last bit differently.)
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as tf

from tests.clients import tiny_engine as engine
from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.generation import GenerationRow, generate, label_scores
from untether.clients.engine.memory import budget_bytes, free_bytes
from untether.clients.engine.training import TrainJob, train
from untether.sim.core.learning import LoraSpec, TrainSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCE = 1e-9


def gpu_base(kind: str) -> tuple[FrozenBase, torch.nn.Module]:
    """(the engine's base, an untouched copy for the oracle), both on the GPU, float64."""
    model = engine.tiny_model(kind).cuda()
    return FrozenBase(copy.deepcopy(model)), model


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_trajectories_equal_separate_peft_runs(kind):
    base, model = gpu_base(kind)
    jobs = engine.mixed_jobs(base)
    results = train(base, jobs, max_cohort=3, pass_tokens=200)
    for job in jobs:
        state, losses = engine.peft_run(model, job)
        state = {name: value.cpu() for name, value in state.items()}
        assert engine.largest_difference(state, results[job.key].state) < TOLERANCE
        assert results[job.key].losses == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.parametrize("kind", engine.ARCHITECTURES)
def test_greedy_decoding_and_label_scores_equal_peft(kind):
    base, model = gpu_base(kind)
    spec = LoraSpec(5, 16)
    state = engine.random_state(base, spec, 1)
    reference = {0: engine.peft_model(model, spec, state), None: model}
    stack = AdapterStack.of_states(base, [spec], [state])
    draw = np.random.default_rng(1)
    rows = [
        GenerationRow(draw.integers(3, engine.VOCABULARY, int(draw.integers(2, 40))).tolist(), (0, None)[k % 2])
        for k in range(8)
    ]
    labels = [[draw.integers(3, engine.VOCABULARY, n).tolist() for n in (1, 3)] for _ in rows]
    answers = generate(base, stack, rows, max_new_tokens=8, batch_size=3)
    scores = label_scores(base, stack, rows, labels)
    for row, answer, of_row, found in zip(rows, answers, labels, scores, strict=True):
        prompt, alone = torch.tensor([row.prompt_ids], device="cuda"), reference[row.adapter]
        with torch.no_grad():
            whole = alone.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                pad_token_id=engine.PAD, eos_token_id=engine.END,
            )[0, prompt.shape[1] :].tolist()  # fmt: skip
            assert answer == (whole[: whole.index(engine.END)] if engine.END in whole else whole)
            for label, value in zip(of_row, found, strict=True):
                logits = alone(input_ids=torch.tensor([[*row.prompt_ids, *label]], device="cuda")).logits[0]
                steps = torch.log_softmax(logits, -1)[prompt.shape[1] - 1 : -1]
                assert sum(steps[t, token].item() for t, token in enumerate(label)) == pytest.approx(
                    value, abs=TOLERANCE
                )


def test_memory_that_really_runs_out_splits_the_pass_and_changes_nothing():
    config = tf.LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    base = FrozenBase(tf.LlamaForCausalLM(config).cuda())
    draw = np.random.default_rng(0)
    jobs = []
    for k in range(8):
        texts = draw.integers(3, 4096, (16, 400)).tolist()
        examples = [engine.Example(text[:380], text[380:]) for text in texts]
        jobs.append(TrainJob(k, examples, TrainSettings(steps=2, batch_size=16), LoraSpec(4), k))
    plenty = train(base, jobs, pass_tokens=6400)
    torch.cuda.empty_cache()
    room = 2 << 30
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        scarce = train(base, jobs, memory_bytes=1 << 40, pass_tokens=1 << 20)
        refused = torch.cuda.memory_stats()["num_ooms"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused and torch.cuda.max_memory_allocated() <= room
    for job in jobs:
        assert scarce[job.key].outcome == "ok"
        assert scarce[job.key].losses == pytest.approx(plenty[job.key].losses, rel=1e-4)


def test_the_budget_is_a_share_of_the_gpus_memory():
    device = torch.device("cuda")
    assert 0 < budget_bytes(None, device) <= free_bytes(device) <= torch.cuda.mem_get_info()[1]


def test_the_model_goes_to_the_gpu_in_bfloat16_by_itself():
    base = FrozenBase.load(resolve("embedded"))
    assert base.device.type == "cuda" and base.dtype == torch.bfloat16
