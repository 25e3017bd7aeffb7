"""The provenance of a run's numbers, for `environment.json`: versions, machine, commit, prompts, models."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.package_data import import_root
from untether.sim.experiment import Experiment
from untether.sim.experiment.plugins import fingerprints
from untether.sim.prompts.protocol import prompt_templates
from untether.sim.run.directory import RunDirectory

PACKAGES = (
    "untether", "flwr", "ray", "torch", "transformers", "peft", "sentence-transformers", "numpy", "openai", "pandas",
    "pyarrow", "scipy", "pydantic", "safetensors", "tokenizers",
)


def began_s(run: RunDirectory) -> float:
    """Returns when a run began, in seconds since 1970."""
    started = (run.read_json("environment.json") or {}).get("started") or WallClock().timestamp()
    return datetime.fromisoformat(started).timestamp()


def describe(experiment: Experiment) -> dict[str, Any]:
    """Returns package versions, hardware, commit, start time, and the prompts verbatim."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": WallClock().timestamp(),
        "python": platform.python_version(),
        "packages": versions,
        "hardware": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": limits.cores(),
            "memory_gib": round(limits.memory_bytes() / 2**30, 1),
            "machine_cores": os.cpu_count(),
            "machine_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "commit": _commit(),
        "models": {
            "base": experiment.model.base, "encoder": experiment.filters.encoder, "cloud": experiment.cloud.model,
        },
        "prompts": prompt_templates(),
        "plugins": fingerprints(experiment.plugins),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    root = import_root()
    if not (root / ".git").exists():
        return None
    try:
        run = ("git", "-C", str(root))
        head = subprocess.run((*run, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run((*run, "status", "--porcelain"), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed.strip() else "")
