"""The cloud of a run: the configured endpoint, or a gateway that the run itself starts on loopback and stops after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from untether.server.background import start_background
from untether.sim.core import limits
from untether.sim.core.errors import UserError
from untether.sim.core.kinds import GENERATORS
from untether.sim.experiment import Experiment
from untether.sim.experiment.endpoint import check_address, is_loopback
from untether.sim.experiment.sections import CloudSection
from untether.sim.run.directory import RunDirectory

LOCAL = ("transformers", "llama_cpp")
"""Providers that run a model on this machine."""

LOADING_S = 600.0
"""How long a large model may take to be read, on a busy machine."""

WORLD_DIALS = (
    "knowledge", "hallucination_rate", "off_topic_rate", "duplicate_rate", "malformed_rate", "verbosity",
)  # fmt: skip


@dataclass(frozen=True)
class OpenCloud:
    """The cloud of a running run: where to send requests, and what to report about it."""

    base_url: str
    model: str
    fingerprint: str
    provider: str
    truth_path: Path | None = None
    limit_s: float = 0.0
    dials: Mapping[str, Any] = field(default_factory=dict)

    def truth(self) -> dict[tuple[str, str, str], str]:
        """Returns how the embedded world's generator made each sample, by (task, input, output)."""
        if self.truth_path is None:
            return {}
        from untether.server.generator.world import read_truth

        return read_truth(self.truth_path)

    def facts(self) -> dict[str, Any]:
        """Returns what the report says about this cloud."""
        return {
            "provider": self.provider,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "base_url": self.base_url if self.provider == "openai" else "loopback",
            "wrote_by_language_model": self.provider in ("openai", *LOCAL)
            or self.provider == "recorded" and self.model not in ("world", "recombine"),
            **({"dials": dict(self.dials)} if self.dials else {}),
        }


@contextlib.contextmanager
def open_cloud(experiment: Experiment, run: RunDirectory) -> Iterator[OpenCloud]:
    """Yields the configured endpoint, or an embedded generator, which is served while the context is open."""
    settings = experiment.cloud
    if settings.provider == "openai":
        yield OpenCloud(settings.base_url, settings.model, "", "openai")
        return
    dials = {name: getattr(settings, name) for name in WORLD_DIALS} if settings.provider == "world" else {}
    truth = _truth_path(settings.cache, dials, run).resolve() if settings.provider == "world" else None
    options: dict[str, Any] = dict(experiment.settings.get(settings.provider, {}))
    if truth is not None:
        truth.parent.mkdir(parents=True, exist_ok=True)
        options = {**dials, "truth": str(truth)}
    if settings.provider in LOCAL:
        options = local_options(settings, settings.provider)
    if settings.provider == "recorded":
        other = settings.otherwise
        rest = local_options(settings, other) if other in LOCAL else dict(experiment.settings.get(other, {}))
        options = {"path": settings.recording, "otherwise": other, "options": rest}
    load = settings.max_tokens, settings.concurrency * (experiment.engine.workers or limits.cores())
    patience_s = LOADING_S if {settings.provider, settings.otherwise} & set(LOCAL) else 120.0
    with start_background(
        settings.provider, options, plugins=experiment.plugins, load=load, start_timeout_s=patience_s
    ) as gateway:
        yield OpenCloud(
            gateway.base_url, gateway.model, gateway.fingerprint, settings.provider, truth, gateway.limit_s, dials
        )


def local_options(settings: CloudSection, provider: str) -> dict[str, Any]:
    """Returns the options of a generator that runs a model on this machine."""
    options = {"model": settings.model, "template_args": settings.template_args, "threads": settings.threads}
    if provider == "llama_cpp":
        return {**options, "context": settings.context, "slots": settings.batch}
    return {**options, "dtype": settings.dtype, **({"max_batch": settings.batch} if settings.batch else {})}


def _truth_path(cache: str, dials: Mapping[str, Any], run: RunDirectory) -> Path:
    """Beside the answers that it is the truth of: whoever finds those must find it. Other dials are another cloud."""
    if not cache:
        return run.path / "state" / "truth.jsonl"
    path = Path(cache).expanduser()
    variant = hashlib.blake2b(json.dumps(dials, sort_keys=True).encode(), digest_size=4).hexdigest()
    return path.with_name(f"{path.name}.truth-{variant}.jsonl")


def check_cloud(experiment: Experiment) -> None:
    """Checks address and key before anything starts.

    Raises:
        UserError: The address is malformed or the key is missing.
    """
    settings = experiment.cloud
    if settings.provider == "recorded":
        from untether.sim.experiment.models.recording import Recording

        Recording.read(Path(settings.recording).expanduser())
        if settings.otherwise:
            GENERATORS.check(settings.otherwise)
    if "llama_cpp" in (settings.provider, settings.otherwise):
        from untether.server.generator.llama_cpp import check_installed, model_file

        check_installed()
        model_file(settings.model)
    if settings.provider == "openai":
        key = os.environ.get(settings.api_key_env, "").strip()
        check_address(settings.base_url, settings.api_key_env, key)
        if settings.api_key_env and not key and not is_loopback(settings.base_url):
            raise UserError(
                f"cloud.base_url = `{settings.base_url}` needs a key: set the environment variable "
                f"{settings.api_key_env} (cloud.api_key_env names it; `cloud.api_key_env =` where it needs none)"
            )
