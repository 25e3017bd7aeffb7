"""A real model on real texts: SmolLM2 135M with its own tokenizer trains, answers and scores labels for 32 devices.

    untether model fetch smollm2-135m
    python -m bench.real [--devices 32] [--repeats 3]

One process, one thread, seconds of processor, medians of the repeats, in which contestants take turns: untether in
float32 and, where that is faster, in `mixed` and in bfloat16; the tuned loop (`bench.tuned`) in float32 with PyTorch's
products and with untether's, and in bfloat16. A device learns four headlines in one step, writes two more and scores
the fifteen labels of LaMP-2 for one text; the loop reads a text once for all its labels, too. The texts are those of
`examples/headlines`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from bench.gemm import rates, shapes_of, training_flops
from bench.tuned import TunedLoop
from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.generation import GenerationRow, generate, label_scores
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.engine.kernels.gemm import MIXED, fast_products, fastest
from untether.clients.engine.training import train
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.population.tasks import get_task

MODEL, LEARNED, ASKED, NEW_TOKENS = "smollm2-135m", 4, 2, 24
STAGES = ("train", "decode", "score")


@dataclass(frozen=True)
class Device:
    """What a device learns, what it is asked, and the text whose labels it scores."""

    job: TrainJob
    prompts: list[list[int]]
    labelled: list[int]


Found = tuple[dict[str, float], dict[int, list[float]], list[list[int]], list[list[float]]]
"""Seconds by stage, losses, answers, label scores."""


def devices_of(base: FrozenBase, count: int) -> tuple[list[Device], list[list[int]]]:
    """Devices with texts drawn from the example's, and the token ids of the labels."""
    lines = Path("examples/headlines/history.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    headline, category = get_task("LaMP_4"), get_task("LaMP_2N")
    spec, found = LoraSpec(), []
    for number in range(count):
        drawn = np.random.default_rng(number).choice(len(items), LEARNED + ASKED + 1, replace=False)
        *rest, last = (items[place] for place in drawn)
        prompts = [encode_prompt(base.tokenizer, headline.prompt(item["input"])) for item in rest]
        examples = [
            Example(prompt, encode_answer(base.tokenizer, item["output"]))
            for prompt, item in zip(prompts[:LEARNED], rest, strict=False)
        ]
        state = AdapterStack.create(base, [spec], [number]).state(0)
        settings = TrainSettings(1e-3, steps=1, batch_size=LEARNED, warmup_ratio=0.0)
        job = TrainJob(number, examples, settings, spec, number, state=state)
        labelled = encode_prompt(base.tokenizer, category.prompt(last["input"]))
        found.append(Device(job, prompts[LEARNED:], labelled))
    return found, [encode_answer(base.tokenizer, label) for label in category.labels or ()]


def untether(base: FrozenBase, devices: list[Device], labels: list[list[int]]) -> Found:
    """All devices together."""
    spent, clock = {}, _Laps()
    results = train(base, [device.job for device in devices])
    spent["train"] = clock.lap()
    stack = AdapterStack.of_states(
        base, [device.job.spec for device in devices], [results[device.job.key].state for device in devices]
    )
    rows = [GenerationRow(prompt, slot) for slot, device in enumerate(devices) for prompt in device.prompts]
    answers = generate(base, stack, rows, max_new_tokens=NEW_TOKENS)
    spent["decode"] = clock.lap()
    asked = [GenerationRow(device.labelled, slot) for slot, device in enumerate(devices)]
    scores = label_scores(base, stack, asked, [labels] * len(asked))
    spent["score"] = clock.lap()
    return spent, {key: result.losses for key, result in results.items()}, answers, scores


def tuned(loop: TunedLoop, devices: list[Device], labels: list[list[int]]) -> Found:
    """One device after the other."""
    spent = dict.fromkeys(STAGES, 0.0)
    losses, answers, scores = {}, [], []
    for device in devices:
        clock = _Laps()
        state, losses[device.job.key] = loop.train(device.job)
        spent["train"] += clock.lap()
        answers += loop.answer(state, device.prompts, NEW_TOKENS)
        spent["decode"] += clock.lap()
        scores.append(label_by_label(loop, device.labelled, labels))
        spent["score"] += clock.lap()
    return spent, losses, answers, scores


@torch.inference_mode()
def label_by_label(loop: TunedLoop, prompt: list[int], labels: list[list[int]]) -> list[float]:
    """Log-likelihoods of labels, in one batch, after one reading of the prompt."""
    read = loop.model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    first = torch.log_softmax(read.logits[0, -1].float(), -1)
    width = max(map(len, labels)) - 1
    ids = torch.zeros(len(labels), width, dtype=torch.long)
    for row, label in enumerate(labels):
        ids[row, : len(label) - 1] = torch.tensor(label[:-1])
    read.past_key_values.batch_repeat_interleave(len(labels))
    logits = loop.model(input_ids=ids, past_key_values=read.past_key_values, use_cache=True).logits
    later = F.log_softmax(logits.float(), -1)
    return [
        first[label[0]].item() + sum(later[row, place, token].item() for place, token in enumerate(label[1:]))
        for row, label in enumerate(labels)
    ]


class _Laps:
    """Seconds of processor since the last lap."""

    def __init__(self) -> None:
        self.begun = time.process_time()

    def lap(self) -> float:
        before, self.begun = self.begun, time.process_time()
        return self.begun - before


def measure(count: int = 32, repeats: int = 3) -> dict[str, Any]:
    """Median seconds by contestant and stage, agreement with untether in float32, and shares of the GEMM rate."""
    folder, narrow = resolve(MODEL), fastest("cpu") == MIXED
    base = FrozenBase.load(folder, "float32", "cpu")
    devices, labels = devices_of(base, count)

    def loop(dtype: str) -> TunedLoop:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return TunedLoop(model, devices[0].job, base.tokenizer.eos_token_id)

    def with_ours(found: TunedLoop) -> Callable[[], Found]:
        def run() -> Found:
            with fast_products():
                return tuned(found, devices, labels)

        return run

    plain = loop("float32")
    everyone: dict[str, Callable[[], Found]] = {"untether": lambda: untether(base, devices, labels)}
    if narrow:
        mixed, whole = FrozenBase.load(folder, MIXED, "cpu"), FrozenBase.load(folder, "bfloat16", "cpu")
        everyone["untether, mixed"] = lambda: untether(mixed, devices, labels)
        everyone["untether, bfloat16"] = lambda: untether(whole, devices, labels)
    everyone |= {"tuned": lambda: tuned(plain, devices, labels), "tuned, fast products": with_ours(plain)}
    if narrow:
        half = loop("bfloat16")
        everyone["tuned, bfloat16"] = lambda: tuned(half, devices, labels)
    runs: dict[str, list[Found]] = {name: [] for name in everyone}
    for turn in range(repeats):
        for name, run in everyone.items():
            with contextlib.redirect_stderr(None):
                runs[name].append(run())
            print(f"turn {turn + 1}: {name} {sum(runs[name][-1][0].values()):.1f} s", flush=True)
    ours = runs["untether"][0]
    rows = [{"contestant": name, **{stage: median(run[0][stage] for run in own) for stage in STAGES},
             "whole": median(sum(run[0].values()) for run in own), **_agreement(ours, own[0])}
            for name, own in runs.items()]  # fmt: skip
    lengths = [(len(e.prompt_ids) + len(e.target_ids) - 1, len(e.target_ids)) for d in devices for e in d.job.examples]
    flops = training_flops(base.model, devices[0].job.spec.rank, lengths)
    shapes = sorted(set(shapes_of(base.model)))
    return {
        "devices": count, "tokens": sum(length for length, _ in lengths), "contestants": rows,
        "achieved": {row["contestant"]: flops / row["train"] for row in rows},
        "rates": {dtype: rates(shapes, 2048, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")},
    }  # fmt: skip


def _agreement(ours: Found, other: Found) -> dict[str, float]:
    losses = [abs(a - b) for key in ours[1] for a, b in zip(ours[1][key], other[1][key], strict=True)]
    scores = [abs(a - b) for x, y in zip(ours[3], other[3], strict=True) for a, b in zip(x, y, strict=True)]
    best = [int(np.argmax(x)) == int(np.argmax(y)) for x, y in zip(ours[3], other[3], strict=True)]
    same = [a == b for a, b in zip(ours[2], other[2], strict=True)]
    return {"same_answers": float(np.mean(same)), "same_labels": float(np.mean(best)),
            "loss_difference": max(losses), "score_difference": max(scores)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.devices, arguments.repeats)
    for row in found["contestants"]:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    least = {side: {stage: min(row[stage] for row in found["contestants"] if row["contestant"].startswith(side))
                    for stage in (*STAGES, "whole")} for side in ("untether", "tuned")}  # fmt: skip
    for stage in (*STAGES, "whole"):
        ratio = least["tuned"][stage] / least["untether"][stage]
        print(f"{stage}: the best tuned loop takes {ratio:.2f} times as long")
    print(f"{found['tokens']} tokens; training achieves, GFLOP/s:",
          "  ".join(f"{name} {rate / 1e9:.0f}" for name, rate in found["achieved"].items()))  # fmt: skip
    print("products alone, GFLOP/s:", {dtype: {name: round(rate / 1e9) for name, rate in of.items()}
                                       for dtype, of in found["rates"].items()})  # fmt: skip


if __name__ == "__main__":
    main()
