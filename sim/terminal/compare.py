"""`untether compare`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from untether.sim.core.text import shown


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Finished run directories.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the page.")] = Path("comparison"),
) -> None:
    """Compare finished runs: what differs in the experiment, paired differences over common users, a page.

    The first run is what the others are compared with.
    """
    from untether.sim.launch.progress import make_console
    from untether.sim.report.compare import Comparison, words, write_comparison
    from untether.sim.run.directory import RunDirectory

    found = [RunDirectory.open(path) for path in runs]
    page = write_comparison(found, out)
    comparison = Comparison(found)
    console = make_console()
    fields = comparison.fields()
    table = _table(["differs", *comparison.runs])
    for name, values in fields:
        table.add_row(*_plain([name, *values]))
    console.print(table if fields else "The experiments are the same.")
    console.print()
    table = _table(["task", "arm", "users", "first", "then", "difference", "p", "verdict"])
    for one in comparison.differences():
        table.add_row(*_plain(words(one)))
    console.print(table)
    console.print(f"report: {page}", soft_wrap=True, markup=False)


def _table(names: list[str]) -> Table:
    table = Table(box=None, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in _plain(names):
        table.add_column(name, overflow="fold")
    return table


def _plain(words: Iterable[str]) -> list[Text]:
    """Words of a run, which may be a stranger's: no markup, no control character."""
    return [Text(shown(word)) for word in words]
