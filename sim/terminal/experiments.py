"""`untether experiment`: print one, explain its fields, and say what it will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from untether.sim.core.errors import UserError
from untether.sim.terminal.completion import complete_field, complete_section, complete_setting

experiment_app = typer.Typer(help="Look at experiments, their fields and their cost.", no_args_is_help=True)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field. May be repeated.",
                 autocompletion=complete_setting),
]  # fmt: skip


@experiment_app.command("show")
def show(
    what: Annotated[
        str, typer.Argument(
            metavar="[SECTION|EXPERIMENT.toml]", help="A section, as a table, or a file. None: the default experiment.",
            autocompletion=complete_section,
        )
    ] = "",
    set_: Set = None,
) -> None:  # fmt: skip
    """Print an experiment as TOML, resolved, with the meaning of every field; or the fields of a section in a table."""
    from untether.sim.experiment import Experiment, guide, key_values
    from untether.sim.launch.progress import make_console

    if what and not what.endswith(".toml") and not Path(what).exists():
        rows = guide.in_section(what)
        table = _table()
        for name in ("field", "default", "meaning"):
            width = 28 if name == "default" else None
            table.add_column(name, overflow="fold", no_wrap=name == "field", max_width=width)
        for name, default, meaning in rows:
            table.add_row(Text(name, style="bold"), Text(default), Text(meaning))
        console = make_console()
        console.print(table)
        console.print(Text(f"One of them: untether experiment explain {rows[0][0]}", style="dim"))
        return
    experiment = Experiment.read(Path(what) if what else None, key_values(set_, "--set"))
    typer.echo(experiment.to_toml(comments=True), nl=False)


@experiment_app.command("explain")
def explain(
    field: Annotated[str, typer.Argument(metavar="FIELD", help="Such as lora.rank.", autocompletion=complete_field)],
) -> None:
    """Explain one field: meaning, default, values, what it changes, where it is used."""
    from untether.sim.experiment import guide
    from untether.sim.launch.progress import make_console

    found = guide.explain(field)
    table = _table()
    table.show_header = False
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    plain = found.default.strip("[]").replace('"', "").replace(", ", ",")
    rows = [
        ("field", found.name), ("meaning", found.meaning), ("default", found.default), ("values", found.values),
        ("changes", found.changes), ("used in", _listed(found.used)), ("in studies", ", ".join(found.studied)),
        ("set it", f"--set {found.name}={plain or '...'}"),
    ]  # fmt: skip
    for name, text in rows:
        if text:
            table.add_row(name, Text(text))
    make_console().print(table)


@experiment_app.command("check")
def check(
    file: Annotated[Path | None, typer.Argument(metavar="[EXPERIMENT.toml]", help="None: the default one.")] = None,
    set_: Set = None,
) -> None:
    """Validate an experiment, its data and models, and say what a run will take on this machine.

    Measures for some seconds on the experiment's own models; what was measured is kept for the next time.
    """
    from untether.sim.experiment import Experiment, key_values
    from untether.sim.launch import speed
    from untether.sim.launch.estimate import estimate
    from untether.sim.launch.progress import make_console
    from untether.sim.launch.resources import Resources
    from untether.sim.launch.runtime import check as check_everything

    experiment = Experiment.read(file, key_values(set_, "--set"))
    check_everything(experiment)
    console = make_console()
    console.print(f"{file or 'the default experiment'}: valid", markup=False)
    workers = Resources.of(experiment, experiment.population.users).workers
    try:
        measured = speed.measure(experiment)
    except UserError as error:
        console.print(f"not measured: {error}", markup=False)
        measured = None
    table = _table()
    table.show_header = False
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in estimate(experiment, measured, workers).lines():
        table.add_row(name, Text(text))
    console.print(table)


def _listed(modules: tuple[str, ...], most: int = 6) -> str:
    more = [f"and {len(modules) - most} more"] if len(modules) > most + 1 else []
    return "\n".join([*modules[: most if more else None], *more])


def _table() -> Table:
    return Table(box=None, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
