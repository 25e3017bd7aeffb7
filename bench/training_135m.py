"""Training alone, a Llama of SmolLM2-135M's shape with random weights, steps of 4 x 64 tokens: tuned peft and untether.

python -m bench.training_135m [--devices 8] [--steps 2] [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
import transformers

from bench.gemm import clock, rates, shapes_of, training_flops
from bench.tuned import TunedLoop
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.engine.training import train
from untether.sim.core.learning import LoraSpec, TrainSettings

ROWS, TOKENS, TARGETS, VOCABULARY = 4, 64, 12, 49152


def model(dtype: torch.dtype) -> torch.nn.Module:
    """SmolLM2-135M's shape, random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def measure(
    devices: int = 8, steps: int = 2, dtype: str = "float32", device: str = "cpu", repeats: int = 3
) -> dict[str, Any]:
    """Seconds (best of repeats, contestants alternating) of the same steps; ratio; share of the GEMM rate."""
    number, now = getattr(torch, dtype), clock(device)
    plain = model(number).to(device)
    base = FrozenBase(copy.deepcopy(plain))
    draw, spec = np.random.default_rng(0), LoraSpec()
    jobs = []
    for k in range(devices):
        rows = draw.integers(3, VOCABULARY, (ROWS, TOKENS + 1)).tolist()
        examples = [Example(row[: TOKENS + 1 - TARGETS], row[TOKENS + 1 - TARGETS :]) for row in rows]
        state = AdapterStack.create(base, [spec], [k]).state(0)
        jobs.append(TrainJob(k, examples, TrainSettings(steps=steps, batch_size=ROWS), spec, k, state=state))
    loop = TunedLoop(plain, jobs[0], 1)
    loop.train(jobs[0])
    train(base, jobs[:2])
    tuned_s, ours_s = [], []
    for _ in range(repeats):
        start = now()
        tuned = [loop.train(job)[1] for job in jobs]
        tuned_s.append(now() - start)
        start = now()
        ours = train(base, jobs)
        ours_s.append(now() - start)
    flops = devices * steps * training_flops(base.model, spec.rank, [(TOKENS, TARGETS)] * ROWS)
    rate = rates(sorted(set(shapes_of(base.model))), 4096, number, device)
    pairs = [
        (a, b)
        for job, losses in zip(jobs, tuned, strict=True)
        for a, b in zip(losses, ours[job.key].losses, strict=True)
    ]
    return {
        "devices": devices, "steps": steps, "device": device, "dtype": dtype,
        "tuned_s": min(tuned_s), "untether_s": min(ours_s),
        "ratio": min(tuned_s) / min(ours_s), "loss_difference": max(abs(a - b) for a, b in pairs),
        "achieved": flops / min(ours_s), "plain_rate": rate["plain"], "fast_rate": rate["fast"],
        "share_of_plain": flops / min(ours_s) / rate["plain"], "share_of_fast": flops / min(ours_s) / rate["fast"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for key, value in measure(arguments.devices, arguments.steps, arguments.dtype, arguments.device).items():
        print(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")


if __name__ == "__main__":
    main()
