"""What it saves to do once what is the same: the main job's devices, with each saving left out in turn.

    python -m bench.once [--users 2] [--repeats 3]

One process, seconds of processor of all that devices do (ask, filter, train, answer), medians of the repeats, in which
the ways take turns. Label likelihoods are measured against a run that scores labels so; the embedded model does not by
itself.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from bench.mixed import _Whole
from untether.clients.device import answering, learn
from untether.clients.device.worker import Endpoint, Models, Worker
from untether.clients.engine import generation, reading, training
from untether.clients.engine.generation import GenerationRow
from untether.clients.filters.embedding import Encoder
from untether.clients.hosting.executors import InProcess
from untether.clients.hosting.in_process import InProcessBackend
from untether.clients.stores import adapter_cache
from untether.server.cloud import open_cloud
from untether.sim.experiment import Experiment
from untether.sim.launch.progress import LiveProgress
from untether.sim.rounds.loop import run_rounds
from untether.sim.run.directory import RunDirectory
from untether.strategies import open_strategy

_NUMBER = itertools.count()


def _never_equal(plain: Callable[..., str]) -> Callable[..., str]:
    return lambda *given: f"{plain(*given)} {next(_NUMBER)}"


def _asked_anew(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: replace(plain(*given), content=str(next(_NUMBER)).encode())


def _every_text(self: Encoder, texts, *, remember=None, progress=None):
    found = {}
    for batch in self._batches(list(texts)):
        found |= dict(zip(batch, self._forward(batch), strict=True))
    return torch.tensor([found[text] for text in texts]).numpy() if texts else torch.zeros(0, self.dim).numpy()


def _label_by_label(base, stack, rows, labels) -> list[list[float]]:
    """Every label behind its own reading of the prompt."""
    once = generation_score
    each = [once(base, stack, [GenerationRow(row.prompt_ids, row.adapter) for row in rows],
                 [[of_row[min(place, len(of_row) - 1)]] for of_row in labels])
            for place in range(max(map(len, labels)))]  # fmt: skip
    return [[each[place][row][0] for place in range(len(of_row))] for row, of_row in enumerate(labels)]


generation_score = generation._score_batch

LEFT_OUT: dict[str, tuple[Any, str, Any]] = {
    "beginnings of prompts, in training": (training, "Prefixes", _Whole),
    "beginnings of prompts, in answering": (reading, "Prefixes", _Whole),
    "adapters that several arms agree in": (adapter_cache, "content_key", _never_equal(adapter_cache.content_key)),
    "answers that several arms agree in": (answering, "_prepared", _asked_anew(answering._prepared)),
    "vectors of texts": (Encoder, "encode", _every_text),
    "token ids of items in several arms": (learn, "cache", lambda plain: plain),
}
LABELS = "prompts of label likelihoods"


@contextmanager
def without(name: str) -> Iterator[None]:
    """The savings, but for one."""
    with ExitStack() as stack:
        if name in LEFT_OUT:
            stack.enter_context(patch.object(*LEFT_OUT[name]))
        elif name == LABELS:
            stack.enter_context(patch.object(generation, "_score_batch", _label_by_label))
        yield


class Runner:
    """Runs an experiment's rounds in this process, again and again, with the same models."""

    def __init__(self, users: int):
        self.models, self.fields = Models(), {"population.users": str(users), "engine.threads": "1"}

    def seconds(self, name: str, likelihood: bool) -> float:
        """Of processor, without the cloud's, which is asked before."""
        fields = self.fields | ({"generation.classify": "likelihood"} if likelihood else {})
        experiment = Experiment.read(None, fields)
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory.create(Path(folder) / "run", experiment)
            with open_cloud(experiment, run) as cloud:
                endpoint = Endpoint(cloud.base_url, cloud.model, cloud.fingerprint)
                worker = Worker(experiment, endpoint, run.path / "state", threads=1, models=self.models)
                backend = InProcessBackend(run, InProcess(lambda: worker), 1)
                with without(name), LiveProgress(voice="quiet") as progress:
                    begun = time.process_time()
                    run_rounds(run, backend, open_strategy(experiment), progress)
                    return time.process_time() - begun


def measure(users: int = 2, repeats: int = 3) -> dict[str, float]:
    """Seconds by what is left out; `all is done once` and the same with label likelihoods come first."""
    runner = Runner(users)
    ways = [("", False), *((name, False) for name in LEFT_OUT), ("", True), (LABELS, True)]
    found: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    runner.seconds("", True)  # loads the models
    for turn in range(repeats):
        for way in ways:
            found[way].append(runner.seconds(*way))
            print(f"turn {turn + 1}: {_words(*way)} {found[way][-1]:.1f} s", flush=True)
    return {_words(*way): median(seconds) for way, seconds in found.items()}


def _words(name: str, likelihood: bool) -> str:
    return (name or "all is done once") + ", by likelihood" * likelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.users, arguments.repeats)
    for name, seconds in found.items():
        whole = found[f"all is done once{', by likelihood' * name.endswith('likelihood')}"]
        print(f"{name:55} {seconds:7.1f} s  {seconds / whole:5.2f}x")


if __name__ == "__main__":
    main()
