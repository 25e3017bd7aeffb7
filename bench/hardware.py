"""Does the cost model predict this machine? A 135M-parameter model, trained and asked, against `this-machine`.

    OMP_NUM_THREADS=1 python -m bench.hardware [--steps 4x64,8x64,4x128,16x64] [--answers 64+16,256+32] [--repeats 3]

Measures the profile as a run does, trains and decodes with a randomly initialised model of SmolLM2-135M's shape and the
project's own engine, and prints predicted and real seconds: of a step of ROWSxTOKENS, and of an answer, PROMPT+NEW
tokens. Measuring and working take turns, the best of each counts. Times are CPU times where one thread runs (other
programs then count little), wall times otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch
import transformers

from clients.adapters import AdapterStack, LoraSpec
from clients.base import FrozenBase
from clients.generation import GenerationRow, generate
from clients.training import Example, TrainJob, TrainSettings, train
from sim.cost import MODELS, CostModel, ModelShape
from sim.experiment import Lora
from sim.hardware import Profile
from sim.this_machine import measure

NAME = "SmolLM2-135M"
LORA = Lora()
STEPS = 2
"""Optimizer steps timed at once."""

Timer = Callable[[], float]


def random_model(shape: ModelShape) -> torch.nn.Module:
    """A Llama of this shape with random weights, which never ends an answer."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def job(rows: int, tokens: int) -> TrainJob:
    """Steps of `rows` examples of `tokens` tokens, a quarter of them targets."""
    targets = tokens // 4
    ids = [[3 + (7 * row + place) % 1000 for place in range(tokens + 1)] for row in range(rows)]
    return TrainJob(
        key=0, examples=[Example(row[: tokens + 1 - targets], row[tokens + 1 - targets :]) for row in ids],
        settings=TrainSettings(steps=STEPS, batch_size=rows), spec=LoraSpec.of(LORA), seed=1, init_seed=1,
    )  # fmt: skip


def step_s(base: FrozenBase, rows: int, tokens: int, now: Timer) -> float:
    """Seconds of the faster of a few optimizer steps."""
    times = [now()]
    train(base, [job(rows, tokens)], progress=lambda done, total: times.append(now()))
    return min(after - before for before, after in zip(times, times[1:], strict=False))


def answer_s(base: FrozenBase, stack: AdapterStack, prompt: int, new: int, now: Timer) -> float:
    """Seconds to answer one query with its adapter."""
    row = GenerationRow([3 + place % 1000 for place in range(prompt)], 0)
    begun = now()
    (found,) = generate(base, stack, [row], max_new_tokens=new)
    took = now() - begun
    assert len(found) == new
    return took


def best(one: Profile | None, other: Profile) -> Profile:
    """The faster figures of two measurements."""
    if one is None:
        return other
    return dataclasses.replace(
        one, compute_gflops=max(one.compute_gflops, other.compute_gflops),
        memory_gb_per_s=max(one.memory_gb_per_s, other.memory_gb_per_s),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="4x64,8x64,4x128,16x64")
    parser.add_argument("--answers", default="64+16,256+32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    steps = [tuple(map(int, each.split("x"))) for each in arguments.steps.split(",")]
    answers = [tuple(map(int, each.split("+"))) for each in arguments.answers.split(",")]
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    base = FrozenBase(random_model(MODELS[NAME]))
    stack = AdapterStack.create(base, [LoraSpec.of(LORA)], [1])
    step_s(base, *steps[0], now)  # warms up
    profile: Profile | None = None
    real: dict[tuple[str, int, int], float] = {}
    for _ in range(arguments.repeats):
        for kind, cases in (("step", steps), ("answer", answers)):
            for one, other in cases:
                profile = best(profile, measure(3, now))
                took = step_s(base, one, other, now) if kind == "step" else answer_s(base, stack, one, other, now)
                real[kind, one, other] = min(took, real.get((kind, one, other), took))
    profile = best(profile, measure(3, now))
    cost = CostModel(profile, MODELS[NAME], 32, LORA)
    print(
        f"{NAME}, {torch.get_num_threads()} threads, this machine: {profile.compute_gflops:.0f} GFLOPS in linear maps, "
        f"{profile.memory_gb_per_s:.1f} GB/s of weights"
    )
    for (kind, one, other), took in real.items():
        if kind == "step":
            predicted = cost.training_s(one * other, one * (other // 4), other)
        else:
            predicted = cost.decoding_s(one, other)
        name = f"{one}x{other}" if kind == "step" else f"{one}+{other}"
        print(f"{kind} of {name} tokens: predicted {predicted:.2f} s, real {took:.2f} s ({predicted / took - 1:+.0%})")


if __name__ == "__main__":
    main()
