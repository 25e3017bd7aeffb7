"""What the terminal shows when a run is done: arms by task, then the contrasts; plain text in a pipe.

`LiveProgress`, which shows the run while it goes on, lives in `sim.launch.progress`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from untether.sim.experiment.arms import METHOD, PRIMARY
from untether.sim.launch.progress import make_console
from untether.sim.report.summary import Contrast, Summary, arrow, interval, metric_name, number, p_value

__all__ = ["Results", "arms_table", "make_console"]


def arms_table(summary: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Summary) -> Results:
    """Returns what a run found, as a rich renderable: arms by task on the primary metric, then the contrasts.

    `summary` is the content of summary.json, or its rows.
    """
    return Results(summary if isinstance(summary, Summary) else Summary(summary))


class Results:
    """Arms by task, then contrasts. Breaks into blocks of tasks where the terminal is narrow."""

    def __init__(self, summary: Summary):
        self._summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summary, plain = self._summary, not console.is_terminal
        if not summary.rows:
            yield Text("No results: the summary has no rows.")
            return
        label = max(len(arm) for arm in summary.arms) + 2
        room = max(1, (options.max_width - label - 1) // 21)
        short = room < len(summary.tasks) <= max(1, (options.max_width - label - 1) // 17)
        if short:
            room = len(summary.tasks)
        blocks = -(-len(summary.tasks) // room)
        room = -(-len(summary.tasks) // blocks)
        for start in range(0, len(summary.tasks), room):
            if start:
                yield Text()
            yield self._arms(summary.tasks[start : start + room], plain, options.ascii_only, 2 if short else 3)
        up, down = arrow("accuracy", options.ascii_only), arrow("mae", options.ascii_only)
        yield Text(f"Mean over users, 95% interval; {up} more is better, {down} less. Best in bold.\n", style="dim")
        contrasts = summary.contrasts()
        if contrasts:
            yield from self._contrasts(contrasts, plain, options)

    def _arms(self, tasks: Sequence[str], plain: bool, ascii_only: bool, digits: int) -> Table:
        table = _table(plain)
        table.add_column("arm", no_wrap=True)
        for task in tasks:
            metric = self._summary.primary(task)
            users = self._summary.users(task)
            head = Text(task, style="bold")
            head.append(f"\n{metric_name(metric)} {arrow(metric, ascii_only)}", style="not bold")
            head.append(f"\n{users} users" if users else "\n", style="not bold dim")
            table.add_column(head, justify="right", no_wrap=True)
        for arm in self._summary.arms:
            cells: list[Text] = []
            for task in tasks:
                row = self._summary.mean(task, arm)
                if row is None or row.get("mean") is None:
                    cells.append(Text("\N{EN DASH}", style="dim"))
                    continue
                best = row["mean"] == self._summary.best(task)
                cell = Text(number(row["mean"], digits), style="bold" if best else "")
                around = interval(row.get("ci_low"), row.get("ci_high"), digits).replace(", ", " ")
                cell.append(f" {around}" if around else "", style="not bold dim")
                cells.append(cell)
            table.add_row(Text(arm, style="bold cyan" if arm == METHOD else ""), *cells)
        return table

    def _contrasts(self, contrasts: Sequence[Contrast], plain: bool, options: ConsoleOptions) -> RenderResult:
        everything, intervals = options.max_width >= 94, options.max_width >= 80
        arms = {contrast.arm for contrast in contrasts}
        table = _table(plain)
        table.add_column(f"{arms.pop()} \N{MINUS SIGN}" if len(arms) == 1 else "contrast", no_wrap=True)
        one_arm = not arms
        table.add_column("task", no_wrap=True)
        table.add_column("difference", justify="right", no_wrap=True)
        if everything:
            table.add_column("W/T/L", justify="right", no_wrap=True)
        if intervals:
            table.add_column("p (Holm)", justify="right", no_wrap=True)
        table.add_column("verdict", overflow="fold")
        last = ""
        for contrast in contrasts:
            if last and contrast.name != last and not plain:
                table.add_section()
            name = contrast.reference if one_arm else contrast.name
            difference = Text(number(contrast.diff, signed=True))
            around = interval(contrast.diff_ci_low, contrast.diff_ci_high, signed=True).replace(", ", " ")
            difference.append(f" {around}" if around and intervals else "", style="dim")
            cells: list[Text | str] = [
                name if contrast.name != last else "",
                f"{contrast.task} {arrow(contrast.metric, options.ascii_only)}",
                difference,
            ]
            last = contrast.name
            if everything:
                counts = (contrast.wins, contrast.ties, contrast.losses)
                cells.append("/".join(map(str, counts)) if None not in counts else "\N{EN DASH}")
            if intervals:
                cells.append(p_value(contrast.p_holm))
            verdict = contrast.verdict()
            table.add_row(*cells, Text(verdict, style=_colour(verdict)))
        yield table
        words = ["W/T/L: users better, tied, worse."] if everything else []
        if intervals:
            words.append(f"Holm: over tasks and {' and '.join(reference for _, reference in PRIMARY)}.")
        yield Text(" ".join(words), style="dim")


def _table(plain: bool) -> Table:
    shape = None if plain else box.SIMPLE_HEAD
    return Table(box=shape, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))


def _colour(verdict: str) -> str:
    if verdict == "better" or verdict.startswith("not worse"):
        return "green"
    return "red" if verdict == "worse" else ""
