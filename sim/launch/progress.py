"""What the terminal shows while a run goes on: which round, which stage, how many devices, how fast, how long still.

It works in three places: a terminal (one line that moves), a pipe or a log (plain lines now and then) and a duplicated
file descriptor, because the engine sends descriptors 1 and 2 to a log file while Ray talks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

_PLAIN_WIDTH = 100


def make_console(file: IO[str] | None = None) -> Console:
    """A console on `file` (default: standard output): its real width on a terminal, 100 columns in a pipe.

    `file` may be a duplicate of the terminal's descriptor; its own size counts then, not that of descriptor 1.
    """
    file = file or sys.stdout
    if not file.isatty():
        return Console(file=file, width=_PLAIN_WIDTH, highlight=False, color_system=None)
    try:
        width = os.get_terminal_size(file.fileno()).columns or None
    except OSError:
        width = None
    return Console(file=file, width=width, highlight=False)


class LiveProgress:
    """Progress of a run: seed and round, stage, devices done, devices a second, time elapsed and left.

    On a terminal one line that moves; elsewhere a plain line at each change of stage and every `every_s` seconds.
    Time is read through the console's own clock, so that a test can turn it. Usable as a context manager.
    """

    #: The share of a round's time a stage is taken to need until a round has been measured; 0: it comes once a seed.
    _SHARES = {"fetch": 0.25, "share": 0.0, "learn": 0.75}

    #: The stages in their order. `filter` comes in rounds in which answers were lost, and takes next to nothing.
    _ORDER = ("fetch", "filter", "share", "learn")

    def __init__(self, console: Console | None = None, file: IO[str] | None = None, every_s: float = 5.0):
        self.console = console or make_console(file)
        self._every_s = every_s
        self._live: Progress | None = None
        self._total_rounds, self._rounds_done = 1, 0
        self._seeds: tuple[int, ...] = ()
        self._rounds = 1
        self._where = ""
        self._stage, self._done, self._total, self._first_done = "", 0, 0, 0
        self._spent: dict[str, list[float]] = {}
        self._printed_s: float | None = None
        self._said_all = False
        self._started_s = self._stage_s = self._now()
        self._cell: _Cell | None = None
        self._cells_s, self._cells_work = 0.0, 0.0

    def _now(self) -> float:
        return self.console.get_time()

    def cell(self, number: int, of: int, name: str, work: float, ahead: float) -> None:
        """The next of several runs begins. `work` is its size against the `ahead` of those after it, in any unit."""
        self.stop()
        if self._cell is not None:
            self._cells_s += self._now() - self._cell.begun_s
            self._cells_work += self._cell.work
        self._cell = _Cell(f"cell {number} of {of}", work, ahead, self._now())
        self.note(f"{self._cell.where}: {name}")

    def start(self, seeds: Sequence[int], rounds: int = 1, rounds_done: int = 0) -> None:
        """The run begins: `rounds` rounds for each of `seeds`; `rounds_done` are committed already (a resumed run)."""
        self.stop()
        self._seeds, self._rounds = tuple(seeds), rounds
        self._total_rounds, self._rounds_done = max(1, len(seeds) * rounds), rounds_done
        self._spent, self._stage = {}, ""
        self._stage_s = self._now()
        if self._cell is None:
            self._started_s = self._stage_s
        if self.console.is_terminal:
            columns: list[ProgressColumn] = [
                TextColumn("{task.fields[where]}", style="bold", table_column=Column(no_wrap=True)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
                _Clock(self),
            ]
            self._live = Progress(*columns, console=self.console, transient=True, expand=True, refresh_per_second=4,
                                  redirect_stdout=False, redirect_stderr=False)  # fmt: skip
            self._live.add_task("starting", where="", count="", total=None)
            self._live.start()

    def begin(self, seed: int, round: int) -> None:
        """A round of a seed begins (`round` counts from 0)."""
        words = [] if self._cell is None else [self._cell.where]
        if len(self._seeds) > 1:
            place = self._seeds.index(seed) + 1 if seed in self._seeds else "?"
            words.append(f"seed {seed} ({place} of {len(self._seeds)})")
        else:
            words.append(f"seed {seed}")
        if self._rounds > 1:
            words.append(f"round {round + 1} of {self._rounds}")
        self._where = ", ".join(words)

    def update(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` devices (for "share": users) have finished `stage`, such as "fetch" or "learn"."""
        now = self._now()
        if stage != self._stage:
            self._close_stage(now)
            self._stage, self._stage_s, self._first_done = stage, now, done
            self._printed_s, self._said_all = None, False
        self._done, self._total = done, total
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=stage, where=self._where, completed=done,
                              total=total or None, count=self._count())  # fmt: skip
            return
        finished = done == total and not self._said_all
        if self._printed_s is None or now - self._printed_s >= self._every_s or finished:
            self._printed_s, self._said_all = now, done == total
            words = [self._where, stage, self._count(), self.clock()]
            self.console.print("  ".join(word for word in words if word), soft_wrap=True)

    def end(self) -> None:
        """The round that was begun is committed."""
        self._close_stage(self._now())
        self._stage, self._done, self._total = "", 0, 0
        self._rounds_done += 1

    def note(self, text: str) -> None:
        """Says something in passing, above the moving line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def stop(self) -> None:
        """The run is over, finished or not: the moving line goes away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def rate(self) -> float | None:
        """Devices a second in this stage; None before the first has finished."""
        elapsed = self._now() - self._stage_s
        return (self._done - self._first_done) / elapsed if elapsed > 0 and self._done > self._first_done else None

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started_s

    def left_s(self) -> float | None:
        """Seconds until the last round of the last run ends; None while there is nothing to go by.

        Runs that wait are taken to need, for their size, what the finished ones did (the first one's is an estimate).
        """
        left_s, cell = self._run_left_s(), self._cell
        if cell is None:
            return left_s
        in_cell_s = self._now() - cell.begun_s
        if self._cells_work:
            per_work_s = self._cells_s / self._cells_work
            left_s = max(0.0, per_work_s * cell.work - in_cell_s) if left_s is None else left_s
        elif left_s is not None:
            per_work_s = (in_cell_s + left_s) / cell.work
        else:
            return None
        return left_s + per_work_s * cell.ahead

    def _run_left_s(self) -> float | None:
        """Seconds until the last round of this run ends, from what stages took so far."""
        per_round = {stage: sum(times) / len(times) for stage, times in self._spent.items()}
        rate = self.rate()
        current_left = (self._total - self._done) / rate if rate else None
        known = sum(self._SHARES.get(stage, 0.0) for stage in per_round)
        if self._stage and self._stage not in per_round:
            if current_left is not None:
                per_round[self._stage] = self._now() - self._stage_s + current_left
            elif known and self._stage in self._SHARES:
                per_round[self._stage] = sum(per_round.values()) * self._SHARES[self._stage] / known
            else:
                return None
        if not per_round:
            return None
        known = sum(self._SHARES.get(stage, 0.0) for stage in per_round)
        once_s = sum(spent for stage, spent in per_round.items() if self._SHARES.get(stage) == 0)
        round_s = sum(per_round.values()) - once_s
        if 0 < known < 1:
            round_s += sum(per_round[stage] for stage in per_round if self._SHARES.get(stage)) * (1 - known) / known
        later = self._total_rounds - self._rounds_done - (1 if self._stage else 0)
        later_s = later * round_s + later // self._rounds * once_s
        if not self._stage:
            return later_s
        if current_left is None:
            current_left = max(0.0, per_round[self._stage] - (self._now() - self._stage_s))
        over = {stage for stage in per_round if stage in self._SHARES and _before(stage, self._stage)} | {self._stage}
        rest_s = round_s - sum(per_round[stage] for stage in over if self._SHARES.get(stage) != 0)
        return current_left + max(0.0, rest_s) + later_s

    def clock(self) -> str:
        """Elapsed and remaining time as text."""
        left_s = self.left_s()
        left = f", about {_duration(left_s)} left" if left_s is not None else ""
        return f"{_duration(self.elapsed_s())} elapsed{left}"

    def _count(self) -> str:
        rate = self.rate()
        text = f"{self._done}/{self._total} {'users' if self._stage == 'share' else 'devices'}"
        return f"{text}, {rate:.3g}/s" if rate is not None else text

    def _close_stage(self, now: float) -> None:
        if self._stage:
            self._spent.setdefault(self._stage, []).append(now - self._stage_s)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A run among several: its place in words, its size, the size of what comes after it, when it began."""

    where: str
    work: float
    ahead: float
    begun_s: float


class _Clock(ProgressColumn):
    """Elapsed and remaining time of the whole run, read anew at every refresh."""

    max_refresh = 0.5

    def __init__(self, progress: LiveProgress):
        super().__init__(table_column=Column(no_wrap=True))
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.clock(), style="dim")


def _before(stage: str, other: str) -> bool:
    order = LiveProgress._ORDER
    return other not in order or order.index(stage) < order.index(other)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
