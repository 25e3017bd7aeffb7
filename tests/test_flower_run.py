"""`flwr run .` as the README has it: Flower's own command, on what is installed, down to the finished run directory."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fleet import tiny

from untether.sim.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def flwr(tmp_path):
    """Runs `flwr` with a home and ports of its own; the SuperLink that it leaves behind ends with the test."""
    home, ports = tmp_path / "home", free_ports(2)
    environment = {
        **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0], "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1", "UV_OFFLINE": "1", "PIP_NO_INDEX": "1",
        "RAY_ADDRESS": "local",  # no cluster of this machine, nor one that has gone and left its address behind
    }  # fmt: skip

    def call(*words: str) -> str:
        done = subprocess.run(
            [BIN / "flwr", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    yield call
    ours = [process for process in psutil.process_iter() if str(home) in said(process)]
    ours += [child for process in ours for child in process.children(recursive=True)]
    for process in ours:
        if process.is_running():
            process.kill()
    psutil.wait_procs(ours, timeout=30)


def said(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.timeout(600)
def test_flwr_run_installs_nothing_and_leaves_a_finished_run(flwr, tmp_path):
    out, file = tmp_path / "run", tmp_path / "tiny.toml"
    experiment = tiny(engine__workers=1, arms="local,cloud", population__users=2)
    file.write_text(experiment.to_toml())
    given = ("--federation-config", "num-supernodes=1", "--run-config", f'experiment="{file}" out="{out}"')
    started = flwr("run", ".", *given)
    number = re.search(r"Successfully started run (\d+)", started)[1]
    log = flwr("log", number, "--stream")
    assert f"run directory: {out}" in log and f"report:        {out / 'report.html'}" in log
    assert "Installing" not in log and not (tmp_path / "home" / "runtime-envs").exists()
    run = RunDirectory.open(out)
    assert run.finished and run.experiment == experiment and (out / "report.html").is_file()
    assert set(run.read("predictions").arm) == {"local", "cloud"}
    assert len(run.read("predictions")) == 2 * 2 * 2 * 2
