"""Does the cost model predict this machine? A 135M-parameter model trained for a few steps, against `this-machine`.

    OMP_NUM_THREADS=1 python -m bench.hardware [--rows 4] [--tokens 64] [--steps 4]

Measures the profile (linear maps of one frozen layer), trains a randomly initialised model of SmolLM2-135M's shape
with the project's own engine, and prints predicted and real seconds a step. Times are CPU times where one thread runs
(other programs then do not count), wall times otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
import transformers

from clients.adapters import LoraSpec
from clients.base import FrozenBase
from clients.training import Example, TrainJob, TrainSettings, train
from sim.cost import MODELS, CostModel, ModelShape
from sim.experiment import Lora
from sim.hardware import built_in
from sim.this_machine import WHOLE_STEP, training_flops_per_s

NAME = "SmolLM2-135M"


def random_model(shape: ModelShape) -> torch.nn.Module:
    """A Llama of this shape with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def job(rows: int, tokens: int, steps: int, lora: Lora) -> TrainJob:
    """Steps of `rows` examples of `tokens` tokens, a quarter of them targets."""
    targets = tokens // 4
    ids = [[3 + (7 * row + place) % 1000 for place in range(tokens + 1)] for row in range(rows)]
    return TrainJob(
        key=0, examples=[Example(row[: tokens + 1 - targets], row[tokens + 1 - targets :]) for row in ids],
        settings=TrainSettings(steps=steps, batch_size=rows), spec=LoraSpec.of(lora), seed=1, init_seed=1,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    lora, shape = Lora(), MODELS[NAME]
    base = FrozenBase(random_model(shape))
    took = []
    speed = training_flops_per_s(now=now)
    for _ in range(2):  # the first run warms up
        times: list[float] = []
        begun = now()
        train(
            base, [job(arguments.rows, arguments.tokens, arguments.steps, lora)],
            progress=lambda done, total, times=times: times.append(now()),
        )  # fmt: skip
        took += [after - before for before, after in zip([begun, *times], times, strict=False)]
    speed = max(speed, training_flops_per_s(now=now))
    real_s = min(took)
    profile = dataclasses.replace(built_in()["raspberry-pi-5"], compute_gflops=speed / 1e9, training_share=WHOLE_STEP)
    tokens = arguments.rows * arguments.tokens
    cost = CostModel(profile, shape, 32, lora)
    predicted_s = cost.training_s(tokens, arguments.rows * (arguments.tokens // 4), arguments.tokens)
    print(f"{NAME}, {arguments.rows}x{arguments.tokens} tokens a step, {torch.get_num_threads()} threads")
    print(f"this machine: {speed / 1e9:.1f} GFLOPS in linear maps")
    print(f"a step: predicted {predicted_s:.2f} s, real {real_s:.2f} s ({predicted_s / real_s - 1:+.0%})")


if __name__ == "__main__":
    main()
