"""Does the cost model predict this machine? A 135M-parameter model, trained and asked, against `this-machine`.

    OMP_NUM_THREADS=1 python -m bench.hardware [--steps 4x64,8x64,4x128] [--answers 64+16,256+32] [--repeats 3]

Measures the profile as a run does, trains and decodes with a randomly initialised model of SmolLM2-135M's shape and the
project's own engine, and prints predicted and real seconds: of a step of ROWSxTOKENS, and of an answer, PROMPT+NEW
tokens. Measuring and working take turns, the best of each counts. Times are CPU times where one thread runs (other
programs then count little), wall times otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from untether.clients.engine.adapters import AdapterStack
from untether.sim.core.learning import LoraSpec
from untether.sim.launch.this_machine import LORA, answer_s, measure, random_base, step_s
from untether.sim.time.cost import SHAPES, CostModel
from untether.sim.time.hardware import Profile

NAME = "SmolLM2-135M"


def best(one: Profile | None, other: Profile) -> Profile:
    """The faster of two measurements of whole steps, and of whole answers."""
    if one is None:
        return other
    steps = max(one, other, key=lambda profile: profile.compute_gflops * profile.training_share)
    answers = max(one, other, key=lambda profile: profile.memory_gb_per_s * profile.decoding_share)
    return dataclasses.replace(
        one, compute_gflops=steps.compute_gflops, training_share=steps.training_share,
        memory_gb_per_s=answers.memory_gb_per_s, decoding_share=answers.decoding_share,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="4x64,8x64,4x128")
    parser.add_argument("--answers", default="64+16,256+32")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    steps = [tuple(map(int, each.split("x"))) for each in arguments.steps.split(",")]
    answers = [tuple(map(int, each.split("+"))) for each in arguments.answers.split(",")]
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    base = random_base(SHAPES[NAME])
    stack = AdapterStack.create(base, [LoraSpec.of(LORA)], [1])
    step_s(base, *steps[0], now)  # warms up
    profile: Profile | None = None
    real: dict[tuple[str, int, int], float] = {}
    for _ in range(arguments.repeats):
        for kind, cases in (("step", steps), ("answer", answers)):
            profile = best(profile, measure(3, now))
            for one, other in cases:
                took = step_s(base, one, other, now) if kind == "step" else answer_s(base, stack, one, other, now)
                real[kind, one, other] = min(took, real.get((kind, one, other), took))
    profile = best(profile, measure(3, now))
    cost = CostModel(profile, SHAPES[NAME], 32, LORA)
    print(f"{NAME}, {torch.get_num_threads()} threads")
    print(
        f"this machine: {profile.compute_gflops:.0f} GFLOPS in linear maps, {profile.training_share:.2f} of it in "
        f"steps; {profile.memory_gb_per_s:.1f} GB/s of weights, {profile.decoding_share:.2f} of it in answers"
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
