"""One small finished run, really run through the command, that several test files look at."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure: nothing here is a timed test.
hypothesis.settings.register_profile("untether", deadline=None)
hypothesis.settings.load_profile("untether")

ARMS = (
    "frozen", "majority", "shared", "rag", "rag_adapter", "local", "local_matched", "synthetic_only", "unfiltered",
    "unfiltered_matched", "placebo", "collaborative", "cloud",
)  # fmt: skip
SMALL = {
    "population.users": "3", "population.tasks": "LaMP_1,LaMP_3,LaMP_4", "population.queries": "3",
    "population.shared_users": "3", "cloud.samples": "6", "training.steps": "3", "arms": ",".join(ARMS),
    "evaluation.resamples": "200",
}  # fmt: skip


def untether(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess:
    """Runs the `untether` command as a user would."""
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "untether", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def settings(values: dict[str, str]) -> list[str]:
    """`--set` options."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A finished run of every arm on embedded users: (run directory, what the command printed)."""
    path = tmp_path_factory.mktemp("finished") / "run"
    done = untether("run", "--out", str(path), *settings(SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout
