"""The command in this process or another, and the order of the files."""

import contextlib
import gc
import io
import os
import subprocess
import sys
from unittest import mock

import hypothesis
import pytest

# Two processes of tests share two cores: threads of theirs would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is compiled once is read by the many processes that tests start, also where the caller's wants no such files.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine is no failure: nothing here is a timed test.
hypothesis.settings.register_profile("untether", deadline=None)
hypothesis.settings.load_profile("untether")

LONGEST_FIRST = (
    "test_deployment", "test_survival", "test_studies_for_real", "test_main_job", "test_drift", "test_determinism",
    "test_api", "test_what_is_trained_on", "test_invariants", "test_app",
    "test_embedding", "test_package", "test_extending",
)  # fmt: skip
"""Files that take long, in that order; all others follow."""


def pytest_configure(config):
    """Where files are run two at a time, xdist would begin with those that hold the most tests, and wait in the end for
    the few that really run something.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="module")
def imported():
    """What is imported is no garbage: searching it for cycles again and again took an eighth of the time."""
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def untether(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess:
    """Runs the `untether` command as a user would."""
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "untether", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def untether_here(*arguments: str) -> subprocess.CompletedProcess:
    """The same command in this process, for what ends before a run starts: importing it anew takes seconds."""
    from untether.sim.terminal.cli import main

    code, printed, said = 0, io.StringIO(), io.StringIO()
    words = mock.patch.object(sys, "argv", ["untether", *arguments])
    with words, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
    return subprocess.CompletedProcess(arguments, code, printed.getvalue(), said.getvalue())


def settings(values: dict[str, str]) -> list[str]:
    """`--set` options."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
