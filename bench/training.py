"""Training alone, a real model's shape with random weights: tuned peft, one user after the other, and untether.

    python -m bench.training [--model smollm2-135m] [--devices 8] [--steps 2] [--dtype float32] [--device cpu]
    python -m bench.training --crossover --device cuda --dtype bfloat16    # from which size on a user fills the machine

A device's step is `--rows` texts of `--tokens` tokens ("60-100": drawn), of which the last 12 are learned.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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

TARGETS = 12

MODELS = {
    "smollm2-135m": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": lambda: transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_model(name: str, dtype: torch.dtype, device: str = "cpu") -> torch.nn.Module:
    """The named model's shape, random weights."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws half a billion weights at once, one thread in half a minute
        return transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype)


def draw_jobs(
    base: FrozenBase, devices: int, steps: int, rows: int, tokens: tuple[int, int], seed: int = 0
) -> list[TrainJob]:
    """Devices with so many steps of `rows` texts, each of a length from `tokens` (first, last)."""
    draw, spec, vocabulary = np.random.default_rng(seed), LoraSpec(), base.model.config.vocab_size
    jobs = []
    for k in range(devices):
        texts = [draw.integers(3, vocabulary, draw.integers(*tokens, endpoint=True) + 1).tolist() for _ in range(rows)]
        examples = [Example(text[:-TARGETS], text[-TARGETS:]) for text in texts]
        state = AdapterStack.create(base, [spec], [k]).state(0)
        jobs.append(TrainJob(k, examples, TrainSettings(steps=steps, batch_size=rows), spec, k, state=state))
    return jobs


def measure(
    devices: int = 8, steps: int = 2, dtype: str = "float32", device: str = "cpu", repeats: int = 3,
    model: str = "smollm2-135m", rows: int = 4, tokens: tuple[int, int] = (64, 64),
) -> dict[str, Any]:  # fmt: skip
    """Seconds (median of repeats, contestants alternating) of the same steps; ratio; share of the GEMM rate."""
    number, now = getattr(torch, dtype), clock(device)
    plain = random_model(model, number, device)
    base = FrozenBase(copy.deepcopy(plain))
    jobs = draw_jobs(base, devices, steps, rows, tokens)
    loop = TunedLoop(plain, jobs[0], 1)
    loop.train(jobs[0])
    train(base, jobs[:2] if device == "cpu" else jobs)  # a GPU's memory, too, is taken before the clock starts
    tuned_s, ours_s = [], []
    for _ in range(repeats):
        start = now()
        tuned = [loop.train(job)[1] for job in jobs]
        tuned_s.append(now() - start)
        start = now()
        ours = train(base, jobs)
        ours_s.append(now() - start)
    spent, ours_spent = statistics.median(tuned_s), statistics.median(ours_s)
    lengths = [len(e.prompt_ids) + len(e.target_ids) - 1 for job in jobs for e in job.examples]
    flops = steps * training_flops(base.model, jobs[0].spec.rank, [(length, TARGETS) for length in lengths])
    rate = rates(sorted(set(shapes_of(base.model))), 4096 if device == "cpu" else 16384, number, device)
    pairs = [
        (a, b)
        for job, losses in zip(jobs, tuned, strict=True)
        for a, b in zip(losses, ours[job.key].losses, strict=True)
    ]
    return {
        "model": model, "devices": devices, "steps": steps, "rows": rows, "device": device, "dtype": dtype,
        "tuned_s": spent, "untether_s": ours_spent,
        "ratio": spent / ours_spent, "loss_difference": max(abs(a - b) for a, b in pairs),
        "tokens_s": steps * sum(lengths) / ours_spent, "tuned_tokens_s": steps * sum(lengths) / spent,
        "achieved": flops / ours_spent, "plain_rate": rate["plain"], "fast_rate": rate["fast"],
        "share_of_plain": flops / ours_spent / rate["plain"], "share_of_fast": flops / ours_spent / rate["fast"],
        "share_of_plain_tuned": flops / spent / rate["plain"],
    }  # fmt: skip


def crossover(model: str, dtype: str, device: str, sizes: tuple[tuple[int, int], ...], devices: int) -> None:
    """Prints the ratio for steps of more and more tokens a user: where batching users stops to pay."""
    for rows, tokens in sizes:
        found = measure(devices, 1, dtype, device, model=model, rows=rows, tokens=(tokens, tokens))
        print(f"{rows * tokens:6d} tokens a user's step ({rows} x {tokens})  {found['ratio']:.2f}x  "
              f"{found['tokens_s']:.0f} tokens/s, tuned {found['tuned_tokens_s']:.0f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(MODELS))
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", default="64", help="of a text: 64, or 60-100")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--crossover", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.crossover:
        sizes = ((1, 64), (4, 64), (8, 128), (16, 256), (16, 1024))
        crossover(arguments.model, arguments.dtype, arguments.device, sizes, arguments.devices)
        return
    first, _, last = arguments.tokens.partition("-")
    found = measure(
        arguments.devices, arguments.steps, arguments.dtype, arguments.device, model=arguments.model,
        rows=arguments.rows, tokens=(int(first), int(last or first)),
    )  # fmt: skip
    for key, value in found.items():
        print(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")


if __name__ == "__main__":
    main()
