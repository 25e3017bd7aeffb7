"""`untether doctor`: whether this machine is ready for an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text


def doctor(
    file: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.toml]", help="None: the default one.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field.")] = None,
) -> None:
    """Look at what an experiment needs here: installation, processor, memory, disk, models, endpoint, Ray, Flower.

    The endpoint gets one real request, which may cost a fraction of a cent. Exit code 1 where something must be mended.
    """
    from untether.sim.experiment import Experiment, key_values
    from untether.sim.launch.progress import make_console
    from untether.sim.terminal.examining import examine

    experiment = Experiment.read(file, key_values(set_, "--set"))
    console = make_console()
    wrong = 0
    for found in examine(experiment):
        table = Table(box=None, show_header=False, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=4)
        table.add_column(width=13)
        table.add_column(overflow="fold")
        words = found.text if found.fine else f"{found.text}. {found.mend}"
        verdict = Text("ok") if found.fine else Text("MEND", style="bold red")
        table.add_row(verdict, found.name, Text(words))
        console.print(table)
        wrong += not found.fine
    if wrong:
        raise typer.Exit(1)
