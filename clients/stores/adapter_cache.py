"""A cache of trained adapters, by the content of everything they depend on, in a folder that runs may share.

An adapter depends on the base, its shape, its settings, its examples, its seeds and the adapter it starts from. Jobs
that agree in all of these give the same adapter, whichever device, arm, cell of a study or run asks; only
floating-point rounding depends on which jobs are trained together. A file is written whole or not at all, so several
processes may share the folder; one that cannot be read, or whose content is not what was written, is trained again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from untether.clients.engine.base import FrozenBase
from untether.clients.engine.training import TrainJob, TrainResult, train
from untether.clients.stores.adapter_store import adapter_version
from untether.sim.core.durable import cannot_write
from untether.sim.core.errors import ResumableStop

ENGINE = 2
"""Count up with every change of the engine that moves numbers beyond rounding: what older ones made is left alone."""

_STEPS = {"losses": torch.float64, "learning_rates": torch.float64, "tokens_by_step": torch.int64}
_STATE = "state."
_DIGEST = 20


def train_once(
    base: FrozenBase, jobs: Sequence[TrainJob], folder: str | Path = "", **options: Any
) -> dict[Hashable, TrainResult]:
    """Trains as `clients.engine.training.train` does, but equal jobs once, and those in `folder` not at all.

    Args:
        base: The frozen base model.
        jobs: The jobs.
        folder: The cache; empty: nothing is kept. A result that ran out of memory is never kept.
        options: Those of `train`.

    Raises:
        ResumableStop: The folder cannot be written.
    """
    if len({job.key for job in jobs}) != len(jobs):
        raise ValueError("two jobs have the same key")
    contents = {job.key: content_key(base, job) for job in jobs}
    results: dict[str, TrainResult] = {}
    missing: dict[str, TrainJob] = {}
    for job in jobs:
        content = contents[job.key]
        if content in results or content in missing:
            continue
        found = _read(_path(folder, content)) if folder else None
        if found is None:
            missing[content] = job
        else:
            results[content] = found
    trained = train(base, list(missing.values()), **options)
    for content, job in missing.items():
        results[content] = trained[job.key]
        if folder and results[content].outcome == "ok":
            _write(_path(folder, content), results[content])
    return {job.key: results[contents[job.key]] for job in jobs}


def content_key(base: FrozenBase, job: TrainJob) -> str:
    """Returns a hash of everything that a job's adapter depends on (of `epochs` and `steps` only the resulting steps).
    """
    settings = dataclasses.replace(job.settings, epochs=0.0, steps=job.total_steps)
    shape = [dataclasses.astuple(job.spec), dataclasses.astuple(settings), job.seed, job.init_seed]
    start = adapter_version(job.state, _DIGEST) if job.state is not None else ""
    parts = "" if job.trainable is None and not job.proximal_mu else f" {job.trainable!r} {job.proximal_mu!r}"
    words = f"{ENGINE} {base.fingerprint} {base.arithmetic} {shape!r} {start}{parts}"
    digest = hashlib.blake2b(words.encode(), digest_size=_DIGEST)
    for example in job.examples:
        for ids in (example.prompt_ids, example.target_ids):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def _path(folder: str | Path, content: str) -> Path:
    return Path(folder).expanduser() / "adapters" / content[:2] / f"{content[2:]}.safetensors"


def _read(path: Path) -> TrainResult | None:
    """What was kept, or None where nothing was or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if adapter_version(tensors, _DIGEST) != (file.metadata() or {}).get("digest"):
                return None
    except (OSError, SafetensorError):
        return None
    steps = {name: tensors.pop(name).tolist() for name in _STEPS}
    return TrainResult({name.removeprefix(_STATE): tensor for name, tensor in tensors.items()}, **steps)


def _write(path: Path, result: TrainResult) -> None:
    tensors: dict[str, Tensor] = {_STATE + name: tensor.cpu().contiguous() for name, tensor in result.state.items()}
    tensors |= {name: torch.tensor(getattr(result, name), dtype=dtype) for name, dtype in _STEPS.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"digest": adapter_version(tensors, _DIGEST)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ResumableStop(cannot_write(path, error)) from error
