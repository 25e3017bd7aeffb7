"""How fast this machine does an experiment's work: measured in a few seconds on its own models, and kept.

The measurement runs in a process of its own, so that whoever asks need not load the models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from untether.sim.core import limits
from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.launch.resources import Resources

VERSION = 7
LIMIT_S = 600.0
TOGETHER = 4

LANGUAGE_MODELS = {"openai": 3.0, "transformers": 30.0, "llama_cpp": 30.0}
"""Providers behind which a language model writes, and about how many seconds it takes for an answer: somebody else's,
and this machine's processor.
"""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one worker's work. The defaults: the embedded models on a core of a 2026 server.

    Args:
        request_s: A request to the cloud.
        sample_s: Filtering a sample.
        token_s: Training on a token.
        answer_s: Writing an answer.
        encoder_setup_s: Until the first sample.
        base_setup_s: Until the first token.
        chars_per_token: Of the base model's tokenizer on the users' texts.
        adapter_bytes: Of an adapter.
    """

    request_s: float = 0.02
    sample_s: float = 0.012
    token_s: float = 3.5e-5
    answer_s: float = 0.02
    encoder_setup_s: float = 4.0
    base_setup_s: float = 1.0
    chars_per_token: float = 4.0
    adapter_bytes: float = 3e5


def speed_of(experiment: Experiment) -> Speed:
    """Returns what was measured on this machine for these models; the default where nothing was."""
    return kept(experiment) or Speed(request_s=_request_s(experiment))


def kept(experiment: Experiment) -> Speed | None:
    """Returns what an earlier measurement found; None where there was none."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8")).get(_key(experiment))
    except (OSError, ValueError, AttributeError):
        return None
    names = {field.name for field in fields(Speed)}
    return Speed(**found) if isinstance(found, dict) and set(found) == names else None


def measure(experiment: Experiment) -> Speed:
    """Measures, keeps what it found, and returns it. Raises UserError where the models do not load.

    As many processes measure as workers will work, at most `TOGETHER`: beside each other they are slower than alone.
    """
    command, layout = [sys.executable, "-m", "untether.sim.launch.speed"], _layout(experiment)
    told = json.dumps({"experiment": experiment.to_toml(), "threads": layout.threads})
    count = min(TOGETHER, layout.workers)

    def once(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=told, capture_output=True, text=True, timeout=LIMIT_S)

    with ThreadPoolExecutor(count) as pool:
        several = list(pool.map(once, range(count)))
    for found in several:
        if found.returncode:
            reason = found.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise UserError(f"the models could not be measured: {reason[0].removeprefix('error: ')}")
    told_by = [json.loads(found.stdout.strip().splitlines()[-1]) for found in several]
    speed = Speed(**{name: sum(one[name] for one in told_by) / count for name in told_by[0]})
    _keep(experiment, speed)
    return speed


def _keep(experiment: Experiment, speed: Speed) -> None:
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), json.dumps({**known, _key(experiment): asdict(speed)}, indent=1))
    except (OSError, ResumableStop):
        pass  # a home that cannot be written to: measured again next time


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "untether" / "speed.json"


def _key(experiment: Experiment) -> str:
    model, engine = experiment.model, experiment.engine
    layout = _layout(experiment)
    named = os.environ.get("UNTETHER_BASE_MODEL", "") if model.base == "embedded" else ""
    words = (
        VERSION, model.base, named, model.dtype, experiment.filters.encoder, engine.device, limits.cores(),
        layout.threads, layout.workers, experiment.lora.rank, experiment.training.batch_size, experiment.cloud.provider,
        experiment.cloud.model, experiment.population.source, experiment.population.path,
    )  # fmt: skip
    return " ".join(map(str, words))


def _layout(experiment: Experiment) -> Resources:
    return Resources.of(experiment, experiment.population.users)


def _request_s(experiment: Experiment) -> float:
    """A request's seconds, about: what the run writes itself is there at once."""
    cloud = experiment.cloud
    alone = LANGUAGE_MODELS.get(cloud.provider)
    return alone / (cloud.concurrency if cloud.provider == "openai" else 1) if alone else Speed().request_s


def _measure_here(experiment: Experiment, threads: int) -> Speed:
    """The work of a few devices, with this process's models."""
    import torch

    from untether.clients.device.worker import Models
    from untether.clients.engine.adapters import AdapterStack
    from untether.clients.engine.encoding import encode_answer, encode_prompt
    from untether.clients.engine.generation import GenerationRow, generate
    from untether.clients.engine.jobs import Example, TrainJob, tokens_a_step
    from untether.clients.engine.training import train
    from untether.sim.core.clock import WallClock
    from untether.sim.core.learning import LoraSpec, TrainSettings
    from untether.sim.population.order import known_history
    from untether.sim.population.source import open_population
    from untether.sim.population.tasks import get_task

    torch.set_num_threads(threads)
    models, model = Models(), experiment.model
    on_cpu = experiment.engine.device == "cpu" or not torch.cuda.is_available()
    # On a processor, the time that this process had: what else the machine is doing now is no measure of it.
    now = (lambda: time.process_time() / threads) if on_cpu else WallClock().now_s
    loading = threads if on_cpu else 1  # by one thread
    population = open_population(experiment, experiment.seeds[0])
    users = [population.user(index) for index in range(min(8, len(population)))]
    items = [item for user in users for task in user.tasks for item in known_history(user, task, 0, 0)]
    items = items[:128]  # a batch of answers
    texts = [get_task(item.task).prompt(item.input, item.form) for item in items]

    begun = 0.0 if on_cpu else now()  # a worker, too, begins with the imports that this process began with
    encoder = models.encoder(experiment.filters.encoder, experiment.engine.device, "")
    encoder.encode([f"{item.input} {item.output}" for item in items[:8]])
    encoder_setup_s = (now() - begun) * loading
    pairs = [f"{number} {item.input} {item.output}" for number, item in enumerate(items[:64])]
    begun = now()
    encoder.encode(pairs)
    sample_s = (now() - begun) / max(1, len(pairs)) * 1.3  # the verdicts beside the vectors

    begun = now()
    base = models.base(model.base, model.dtype, experiment.engine.device, model.template_args)
    examples = [
        Example(encode_prompt(base.tokenizer, text), encode_answer(base.tokenizer, item.output))
        for text, item in zip(texts, items, strict=True)
    ]
    spec = LoraSpec.of(experiment.lora)
    size = experiment.training.batch_size
    count, steps = (12, 4) if base.model.num_parameters() < 5e7 else (2, 2)

    def jobs(first: int) -> list[TrainJob]:
        settings = TrainSettings.of(experiment.training, steps=steps)
        some = {first + k: examples[k % len(examples) :][: 2 * size] for k in range(count)}
        return [TrainJob(key=k, examples=own, settings=settings, spec=spec, seed=k) for k, own in some.items()]

    train(base, jobs(0)[:1])
    base_setup_s = (now() - begun) * loading
    todo = jobs(1)
    begun = now()
    trained = train(base, todo)
    token_s = (now() - begun) / max(1.0, tokens_a_step(todo) * steps * len(todo)) * 1.15  # keeping the adapters, too

    stack = AdapterStack.of_states(base, [spec], [trained[todo[0].key].state])
    rows = [GenerationRow(example.prompt_ids, 0) for example in examples[: 128 if count > 2 else 4]]
    limits_ = [len(example.target_ids) + 1 for example in examples[: len(rows)]]
    begun = now()
    generate(base, stack, rows, max_new_tokens=limits_)
    answer_s = (now() - begun) / max(1, len(rows))
    chars = sum(len(text) + len(item.output) for text, item in zip(texts, items, strict=True))
    tokens = sum(len(example.prompt_ids) + len(example.target_ids) for example in examples)
    return Speed(
        _request_s(experiment), sample_s, token_s, answer_s, encoder_setup_s, base_setup_s, chars / max(1, tokens),
        float(stack.bytes_per_adapter),
    )  # fmt: skip


def _main() -> None:
    told: dict[str, Any] = json.load(sys.stdin)
    try:
        speed = _measure_here(Experiment.parse(told["experiment"]), told["threads"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(asdict(speed)))


if __name__ == "__main__":
    _main()
