"""What an experiment needs of this machine: each thing looked at, with how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.experiment import Experiment

LEAST_MEMORY, LEAST_DISK = 3e9, 2e9
"""Below which the default experiment does not fit: Ray, Flower and two workers with torch."""

SOCKET_CHARS = 107
"""Most characters of a socket's path on Linux; Ray's lie in the temporary folder, below some seventy of its own."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found of one thing: fine or not, in words, and what to do where it is not."""

    name: str
    fine: bool
    text: str
    mend: str = ""


def examine(experiment: Experiment) -> Iterator[Examined]:
    """Yields each thing as it is found. Whatever goes wrong is a finding."""
    checks: tuple[tuple[str, Callable[[Experiment], Examined]], ...] = (
        ("installation", _installation), ("processor", _processor), ("gpu", _gpu), ("memory", _memory),
        ("disk", _disk), ("base model", _base), ("encoder", _encoder), ("endpoint", _endpoint), ("ray", _ray),
        ("flower", _flower),
    )  # fmt: skip
    for name, check in checks:
        try:
            yield check(experiment)
        except (UserError, ResumableStop) as error:
            yield Examined(name, False, str(error).splitlines()[0], "see the message")
        except Exception as error:
            yield Examined(name, False, f"{type(error).__name__}: {error}", "reinstall: make install")


def _installation(experiment: Experiment) -> Examined:
    missing = []
    for line in importlib.metadata.requires("untether") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            missing.append(f"{wanted.name} {version} is not {wanted.specifier}")
    text = f"untether {importlib.metadata.version('untether')}, Python {platform.python_version()}"
    return Examined("installation", not missing, "; ".join([text, *missing]), "Run: make install")


def _processor(experiment: Experiment) -> Examined:
    import torch

    from untether.clients.engine.kernels.gemm import MIXED, bfloat16_gain, fastest

    cores, gain, kind = limits.cores(), bfloat16_gain(), torch.backends.cpu.get_cpu_capability()
    taken = fastest("cpu")
    slow = experiment.model.dtype in (MIXED, "bfloat16") and gain < 1 and not torch.cuda.is_available()
    products = f"products in bfloat16 are {gain:.1f} times as fast as in float32 (model.dtype fastest: {taken})"
    text = f"{cores} core{'s' * (cores > 1)}, {kind}; {products}"
    return Examined("processor", not slow, text, "Set model.dtype = float32")


def _gpu(experiment: Experiment) -> Examined:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        wanted = experiment.engine.device == "cuda"
        return Examined("gpu", not wanted, "none" + ("" if wanted else " (not needed)"), "Set engine.device = auto")
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    return Examined("gpu", True, f"{count} x {name}, {memory / 2**30:.0f} GiB")


def _memory(experiment: Experiment) -> Examined:
    whole, free = limits.memory_bytes(), limits.available_bytes()
    text = f"{free / 2**30:.1f} of {whole / 2**30:.1f} GiB are free, as this container allows"
    return Examined("memory", free >= LEAST_MEMORY, text, "Close something, or set engine.workers = 1")


def _disk(experiment: Experiment) -> Examined:
    places = {str(Path.cwd()): "here", tempfile.gettempdir(): "for temporary files"}
    free = {words: shutil.disk_usage(place).free for place, words in places.items()}
    text = ", ".join(f"{count / 1e9:.1f} GB free {words}" for words, count in free.items())
    return Examined("disk", min(free.values()) >= LEAST_DISK, text, "Free some space, or set TMPDIR")


def _base(experiment: Experiment) -> Examined:
    from transformers.utils import logging as transformers_logging

    from untether.clients.base_model import resolve
    from untether.clients.engine.base import FrozenBase

    transformers_logging.disable_progress_bar()  # between the doctor's lines
    model, begun = experiment.model, WallClock().now_s()
    device, given = experiment.engine.device, model.template_args
    base = FrozenBase.load(resolve(model.base), model.dtype, device, template_args=given)
    size, took_s = base.model.num_parameters() / 1e6, WallClock().now_s() - begun
    text = f"{model.base}: {size:.1f} M parameters, {base.arithmetic}, {took_s:.1f} s to load"
    return Examined("base model", True, text)


def _encoder(experiment: Experiment) -> Examined:
    from untether.clients.filters.embedding import Encoder

    encoder = Encoder(experiment.filters.encoder, device=experiment.engine.device)
    dim = encoder.encode(["one text"]).shape[1]
    return Examined("encoder", True, f"{experiment.filters.encoder}: {dim} dimensions, {encoder.dtype}")


def _endpoint(experiment: Experiment) -> Examined:
    from untether.server.cloud import check_cloud

    cloud = experiment.cloud
    check_cloud(experiment)
    if cloud.provider != "openai":
        return Examined("endpoint", True, f"served by the run itself ({cloud.provider})")
    from untether.clients.cloud.client import CloudClient
    from untether.clients.device.augmentation import samples_requests
    from untether.sim.core.records import Interaction
    from untether.sim.population.tasks import get_task

    items = [Interaction("1", "LaMP_4", "The council voted on Monday to plant a thousand trees.", "A thousand trees")]
    request = samples_requests(get_task("LaMP_4"), items, 1, request_id="doctor", device_id="doctor", seed=0, round=0)
    client = CloudClient(cloud.model_copy(update={"max_retries": 0}), cache="", wall=True)
    reply = client.ask_sync(request)[0]
    last = reply.attempts[-1]
    read, written = last.tokens_in or 0, last.tokens_out or 0
    price = (read * cloud.capacity.price_in + written * cloud.capacity.price_out) / 1e6
    said = [
        f"{cloud.base_url}, {reply.model or cloud.model}: {reply.outcome} in {last.duration_s:.1f} s",
        f"{read} tokens in, {written} out" + (" (estimated)" if last.tokens_estimated else ""),
        "no price given (cloud.capacity.price_in, price_out)" if not price else f"price {price:.6f}",
        f"refuses {', '.join(sorted(client.left_out))}" if client.left_out else "takes JSON by schema",
    ]  # fmt: skip
    text = "; ".join(filter(None, said))
    return Examined("endpoint", reply.ok, f"{text} {last.detail}".strip(), "Look at the key and at cloud.model")


def _ray(experiment: Experiment) -> Examined:
    import ray

    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    text = f"ray {ray.__version__}" + (f", {shared / 1e9:.1f} GB of shared memory free" if shared is not None else "")
    if len(folder) + 70 > SOCKET_CHARS:
        return Examined("ray", False, f"{text}; {folder} is too long for Ray's sockets", "Set TMPDIR to a short folder")
    return Examined("ray", shared is None or shared > 5e7, text, "Give the container more: docker run --shm-size=1g")


def _flower(experiment: Experiment) -> Examined:
    import flwr

    variable = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"
    asked = os.environ.get(variable) == "1"
    hint = "" if asked else f"; for `flwr run` set {variable}=1, or Flower downloads every dependency anew"
    return Examined("flower", True, f"flwr {flwr.__version__}{hint}")
