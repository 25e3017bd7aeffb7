"""A worker process: it holds what is heavy (base model, encoder) and runs shards of devices through it.

The process outlives a run: each call says which run it is for, and a model that the next run shares is not loaded
again. It may die at any moment: its shard is run again elsewhere and writes the same parts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untether.clients.device.device import Shard
from untether.clients.device.worker import Endpoint, Models, Worker
from untether.clients.hosting.carrier import Files, Mirror, Parcel

PROGRESS = "progress"
"""The file of a mirror that tells how far its worker is."""


def _fetch(worker: Worker, shard: Shard, order: Mapping[str, Any]) -> dict[str, Any]:
    from untether.clients.device.fetch import fetch

    return fetch(worker, shard, order)


def _filter(worker: Worker, shard: Shard, order: Mapping[str, Any]) -> dict[str, Any]:
    from untether.clients.device.fetch import filter_again

    return filter_again(worker, shard, order)


def _learn(worker: Worker, shard: Shard, order: Mapping[str, Any]) -> dict[str, Any]:
    from untether.clients.device.learn import learn

    reply = learn(worker, shard, order)
    worker.tell_written(shard)
    return reply


def _share(worker: Worker, seed: int, part: int = 0, parts: int = 1) -> dict[str, Any]:
    from untether.clients.device.shared import train_shared

    return train_shared(worker, seed, part, parts)


# Imported when they are first run: a host, which names them, should not wait for torch.
PASSES: dict[str, Callable[..., dict[str, Any]]] = {
    "fetch": _fetch, "filter": _filter, "learn": _learn, "share": _share
}  # fmt: skip
"""What a worker can be told to do with a shard of devices, or, to `share`, for the whole fleet."""


@dataclass(frozen=True, slots=True)
class Post:
    """What a worker is told with each call: its run directory, the cloud, torch threads, where to tell progress, and
    its number among the workers.
    """

    run: str
    endpoint: Endpoint
    threads: int = 0
    progress: str = ""
    number: int = 0


class WorkerProcess:
    """What lives in a process of its own (a Ray actor): its models, and a worker for the run that it works for now.

    Where it does not see the run directory, the worker has a mirror of it (`clients.hosting.carrier`).
    """

    def __init__(self) -> None:
        self._models = Models()
        self._worker: Worker | None = None
        self._post: Post | None = None
        self._mirror: tuple[str, Mirror] | None = None

    def at(self, post: Post) -> Worker:
        """The worker of a run, with this process's models."""
        if self._worker is None or self._post != post:
            self._worker = Worker(post.run, post.endpoint, post.threads, post.progress, self._models, post.number)
            self._post = post
        return self._worker

    def pid(self) -> int:
        """This process: an answer, whatever the run, says that it lives."""
        return os.getpid()

    def call(self, post: Post, method: str, *arguments: Any) -> Any:
        """A pass on the worker of that run."""
        return PASSES[method](self.at(post), *arguments)

    def sees(self, path: str, content: str) -> bool:
        """Whether this process sees a file as its caller wrote it: whether they share the run directory."""
        try:
            return Path(path).read_text() == content
        except OSError:
            return False

    def lacking(self, post: Post, wanted: Mapping[str, bytes]) -> list[str]:
        """Which files this process's mirror of the run lacks (see `Mirror.lacking`)."""
        return self._mirror_of(post).lacking(wanted)

    def call_away(self, post: Post, files: Files, method: str, *arguments: Any) -> Parcel:
        """As `call`, on the mirror, with those files laid down in it."""
        mirror = self._mirror_of(post)
        before = mirror.take(files)
        worker = self.at(dataclasses.replace(post, run=str(mirror.path), progress=str(mirror.path / PROGRESS)))
        worker.reread()
        return mirror.parcel(PASSES[method](worker, *arguments), before)

    def look(self) -> str:
        """How far the call on the mirror is. Answered while that call runs."""
        try:
            return (self._mirror[1].path / PROGRESS).read_text() if self._mirror else ""
        except OSError:
            return ""

    def _mirror_of(self, post: Post) -> Mirror:
        if self._mirror is None or self._mirror[0] != post.run:
            if self._mirror is not None:
                self._mirror[1].close()
            self._mirror = post.run, Mirror()
        return self._mirror[1]
