"""Really running, really killing: what the survival tests and `make soak` share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from fleet import answers, metrics
from pandas.testing import assert_frame_equal
from test_determinism import assert_same_results

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


class Untether:
    """`untether run` (or another command) in a process of its own, to be killed."""

    def __init__(self, *arguments: str, command: str = "run", env: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "untether", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**ENVIRONMENT, **(env or {})},
        )
        self.family: list[psutil.Process] = []

    def __enter__(self) -> Untether:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def workers(self) -> list[psutil.Process]:
        """The worker processes of this very run."""
        return [process for process in self._family() if _name(process).startswith("ray::Worker")]

    def kill(self) -> None:
        """SIGKILL, without a warning and to the coordinator alone."""
        self._family()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout_s: float = 600) -> tuple[int, str]:
        """(exit code, what it printed), once it has ended."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def orphans(self, within_s: float = 90) -> list[str]:
        """What of it still runs after a while, but for Ray's agents: they look for their parent once a minute or so."""
        ours = [process for process in self.family if not _name(process).startswith(_AGENTS)]
        _, alive = psutil.wait_procs(ours, timeout=within_s)
        return [_name(process) for process in alive]

    def _family(self) -> list[psutil.Process]:
        try:
            self.family = psutil.Process(self.process.pid).children(recursive=True) or self.family
        except psutil.NoSuchProcess:
            pass
        return self.family


_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(what, run: Untether, timeout_s: float = 600) -> None:
    """Waits until `what()` is true; AssertionError with the run's last words where it ends before."""
    end = time.monotonic() + timeout_s
    while not what():
        if run.process.poll() is not None:
            raise AssertionError(f"the run ended before: {run.end()[1]}")
        assert time.monotonic() < end, f"{what} within {timeout_s} s"
        time.sleep(0.2)


def commits(path: Path) -> int:
    """Rounds that are committed."""
    return len(list((path / "state" / "commits").glob("*.json")))


def assert_whole(run, undisturbed, rounds=3):
    """Every round is there once, and its results are those of the undisturbed run."""
    assert_same_results(run, undisturbed)
    assert not answers(run).duplicated(["seed", "round", "device_id", "arm", "query_id"]).any()
    assert sorted(metrics(run)["round"].unique()) == list(range(rounds))
    assert not run.read("events")["event_id"].duplicated().any()
    assert_frame_equal(_happened(run), _happened(undisturbed))


def _happened(run):
    """What happened in virtual time, whatever happened to the workers."""
    events = run.read("events")
    columns = ["seed", "round", "time_s", "event_id", "device_id", "arm", "kind", "outcome", "duration_s", "energy_j"]
    return events.loc[events["kind"] != "worker_died", columns].sort_values(columns[:4]).reset_index(drop=True)
