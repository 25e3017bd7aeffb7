"""`untether deploy`: the same app on Flower's SuperLink and SuperNodes, run on this machine or laid out for many."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from untether.sim.core.errors import UserError
from untether.sim.terminal.completion import complete_setting
from untether.sim.terminal.speaker import Speaker


def deploy(
    experiment: Annotated[
        Path | None, typer.Argument(metavar="[EXPERIMENT.toml]", help="None: the default one.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many real devices, each with one user.")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field. May be repeated.", autocompletion=complete_setting
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: deployments/NAME.")] = None,
    host: Annotated[str, typer.Option("--host", help="Where nodes reach the server: name or address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The server's port; 0: a free one.")] = 0,
    write: Annotated[bool, typer.Option("--write", help="Lay everything out, and start nothing.")] = False,
) -> None:
    """Run an experiment on real nodes: Flower's SuperLink and SuperNodes, with TLS, in wall-clock time.

    On this machine each node is a process group with a folder of its own, which stands for a device: its settings, its
    user's data, its store. With `--write` the folder DIR gets certificates, the app, a folder a node and
    `commands.txt`, to be carried to other machines (docs/deploy.md). Ctrl-C stops; the same command goes on.
    """
    from untether.sim.experiment import Experiment, key_values
    from untether.sim.launch.deploy import Deployment, deployable
    from untether.sim.launch.runtime import stopping
    from untether.sim.run.directory import RunDirectory

    speaker = Speaker("lines")
    asked = Experiment.read(experiment, key_values(set_, "--set"))
    found, left_out = deployable(asked, nodes)
    if left_out:
        speaker.say("left_out", f"left out: {', '.join(left_out)}, which need other users' data on a device")
    deployment = Deployment((out or Path("deployments") / found.name).resolve(), found, host, port)
    if RunDirectory(deployment.run_directory).finished:
        raise UserError(f"{deployment.run_directory} is finished. Give another --out")
    deployment.write()
    if write:
        speaker.say("written", f"wrote {deployment.folder}: what to start where is in {deployment.folder}/commands.txt")
        return
    again = shlex.join(["untether", *sys.argv[1:]])
    stop = threading.Event()
    with stopping(stop, deployment.end):
        deployment.run(lambda line: speaker.say("deployment", line), stop, again)
    speaker.done(RunDirectory(deployment.run_directory))
