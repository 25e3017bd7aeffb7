"""What the terminal shows while a run goes on: which round, which stage, how much work is done, how long still.

It works in three places: a terminal (one line that moves, and one of the cloud's health), a pipe or a log (few plain
lines) and a duplicated file descriptor, because descriptors 1 and 2 go to a log file while Ray talks. Programs are told
by lines of JSON, an event each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from untether.sim.launch.time_left import NAMES, REPORT, Guess, TimeLeft
from untether.sim.rounds.work import Work

Voice = Literal["lines", "json", "quiet"]
"""How a run speaks: to people, to programs, or not at all."""

_PLAIN_WIDTH = 100


def make_console(file: IO[str] | None = None) -> Console:
    """Returns a console on `file` (default: standard output): its real width on a terminal, 100 columns in a pipe.

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
    """Progress of a run: seed and round, the step, what is counted in it, time elapsed and left, the cloud's health.

    On a terminal a line that moves; elsewhere a plain line at each step and every `every_s` seconds. `voice` is `json`
    for a line of JSON an event, `quiet` for nothing. Time is read through the console's own clock, so that a test can
    turn it. Usable as a context manager.
    """

    def __init__(
        self, console: Console | None = None, file: IO[str] | None = None, every_s: float = 30.0, voice: Voice = "lines"
    ):
        self.console = console or make_console(file)
        self.voice = voice
        self._every_s = every_s
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._seeds: tuple[int, ...] = ()
        self._rounds = 1
        self._at: dict[str, Any] = {}
        self._stage, self._work, self._devices = "", dict[str, float](), 0
        self._said: tuple[str, str] = ("", "")
        self._said_s = 0.0
        self._guess: Guess | None = None
        self._time = TimeLeft(1)
        self._step_s, self._step_units = 0.0, 0.0
        self._cloud: dict[str, float] = {}
        self._started_s = self._now()
        self._cell: _Cell | None = None
        self._cells_s, self._cells_work = 0.0, 0.0

    def _now(self) -> float:
        return self.console.get_time()

    def expect(self, guess: Guess) -> None:
        """Takes what the next run that starts is expected to need."""
        self._guess = guess

    def cell(self, number: int, of: int, name: str, work: float, ahead: float) -> None:
        """Begins one of several runs. `work` is its size against the `ahead` of those after it, in any unit."""
        self.stop()
        if self._cell is not None:
            self._cells_s += self._now() - self._cell.begun_s
            self._cells_work += self._cell.work
        self._cell = _Cell(f"cell {number} of {of}", work, ahead, self._now())
        self.note(f"{self._cell.where}: {name}")

    def start(self, seeds: Sequence[int], rounds: int = 1, rounds_done: int = 0) -> None:
        """Begins the run: `rounds` rounds for each of `seeds`; `rounds_done` are committed already (a resumed run)."""
        self.stop()
        self._seeds, self._rounds = tuple(seeds), rounds
        self._time = TimeLeft(max(1, len(seeds) * rounds), rounds_done, rounds, self._guess)
        self._guess, self._stage, self._cloud = None, "", {}
        self._event("start", seeds=list(seeds), rounds=rounds, rounds_done=rounds_done)
        if self.console.is_terminal and self.voice == "lines":
            columns: list[ProgressColumn] = [
                TextColumn("{task.fields[where]}", style="bold", table_column=Column(no_wrap=True)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
                _Clock(self),
            ]
            self._bar = Progress(*columns, expand=True)
            self._bar.add_task("starting", where="", count="", total=None)
            self._live = Live(get_renderable=self._shown, console=self.console, transient=True, refresh_per_second=4,
                              redirect_stdout=False, redirect_stderr=False)  # fmt: skip
            self._live.start()

    def _shown(self) -> Group:
        health = self.cloud()
        lines = [Text(health, style="dim", no_wrap=True, overflow="ellipsis")] if health else []
        return Group(*([self._bar] if self._bar is not None else []), *lines)

    def begin(self, seed: int, round: int) -> None:
        """Begins a round of a seed (`round` counts from 0)."""
        self._at, self._cloud = {"seed": seed, "round": round}, {}
        self._time.begin(self._now())
        self._event("round", **self._at)

    @property
    def _where(self) -> str:
        words = [] if self._cell is None else [self._cell.where]
        if self._at:
            seed, round = self._at["seed"], self._at["round"]
            several = len(self._seeds) > 1 and seed in self._seeds
            place = f" ({self._seeds.index(seed) + 1} of {len(self._seeds)})" if several else ""
            words.append(f"seed {seed}{place}")
            if self._rounds > 1:
                words.append(f"round {round + 1} of {self._rounds}")
        return ", ".join(words)

    def update(self, stage: str, work: Work, total: int) -> None:
        """Takes note of how much of a stage is done, such as "fetch" or "learn", of `total` devices (for "share":
        users).
        """
        now = self._now()
        self._time.update(now, stage, work, total)
        self._stage, self._work, self._devices = stage, dict(work), total
        self._cloud |= {name: count for name, count in work.items() if name.startswith("cloud")}
        step = self._time.step()
        key = (stage, step[1] if step else "")
        done, due = self._time.counts(step) if step else (0.0, None)
        if key != self._said:
            self._step_s, self._step_units = now, done
        if self._bar is not None:
            share = self._time.share_done()
            self._bar.update(self._bar.task_ids[0], description=self.stage(), where=self._where, completed=share or 0.0,
                             total=None if share is None else 1.0, count=self.count())  # fmt: skip
        elif key != self._said or now - self._said_s >= self._every_s:
            self._said_s = now
            words = [self._where, self.stage(), self.count(), self.clock(), self.cloud()]
            self.note("  ".join(word for word in words if word), event=False)
            self._event(
                "progress", **self._at, stage=stage, step=self.stage(), unit=key[1], done=done, due=due,
                left_s=self.left_s(), cloud=self._outcomes(),
            )
        self._said = key

    def end(self) -> None:
        """Ends the round that was begun: it is committed."""
        self._time.end(self._now())
        self._stage = ""
        self._event("committed", **self._at, left_s=self.left_s())

    def note(self, text: str, event: bool = True) -> None:
        """Says something in passing, above the moving line."""
        if self.voice == "lines":
            self.console.print(text, soft_wrap=True, markup=False, emoji=False)
        elif event:
            self._event("note", text=text)

    def _event(self, name: str, **facts: Any) -> None:
        """A line of JSON, for programs."""
        if self.voice == "json":
            say_event(self.console, name, elapsed_s=round(self.elapsed_s(), 1), **facts)

    def stop(self) -> None:
        """Ends the run, finished or not: the moving line goes away."""
        if self._live is not None:
            self._live.stop()
            self._live = self._bar = None

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stage(self) -> str:
        """Returns what is being done, in words."""
        if self._stage == REPORT:
            return "writing tables and report"
        step = self._time.step()
        return NAMES[step] if step else self._stage or "starting"

    def count(self) -> str:
        """Returns what is counted in this step: "120 of 600 answers, 12/s"; of real nodes, who only reply: "2 of 3
        devices".
        """
        step = self._time.step()
        done, due = self._time.counts(step) if step else (0.0, None)
        if step is None or not done and not due:
            whole = self._work.get("devices", 0.0)
            return f"{_amount(whole)} of {_amount(self._devices)} devices" if whole else ""
        elapsed = self._now() - self._step_s
        rate = (done - self._step_units) / elapsed if elapsed > 0 and done > self._step_units else None
        of = f" of {_amount(due)}" if due is not None and due >= done else ""
        return f"{_amount(done)}{of} {step[1]}" + (f", {_amount(rate)}/s" if rate is not None else "")

    def cloud(self) -> str:
        """Returns how the cloud does: replies by outcome, and how long one took."""
        outcomes = self._outcomes()
        if not outcomes:
            return ""
        found = ", ".join(f"{count:.0f} {name}" for name, count in outcomes.items())
        took = self._cloud.get("cloud_s", 0.0) / sum(outcomes.values())
        return f"cloud: {found}, {took:.2g} s each"

    def _outcomes(self) -> dict[str, float]:
        found = {name.removeprefix("cloud."): n for name, n in self._cloud.items() if name.startswith("cloud.")}
        return dict(sorted(found.items(), key=lambda pair: (pair[0] != "ok", -pair[1])))

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self._now() - self._started_s

    def left_s(self) -> float | None:
        """Seconds until the last round of the last run ends; None while there is nothing to go by.

        Runs that wait are taken to need, for their size, what the finished ones did (the first one's is an estimate).
        """
        left_s, cell = self._time.left_s(self._now()), self._cell
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

    def clock(self) -> str:
        """Returns elapsed and remaining time as text."""
        left_s = self.left_s()
        left = f", about {duration(left_s)} left" if left_s is not None else ""
        return f"{duration(self.elapsed_s())} elapsed{left}"


def say_event(console: Console, name: str, **facts: Any) -> None:
    """Prints one event as a line of JSON."""
    told: Mapping[str, Any] = {"event": name, **facts}
    console.out(json.dumps(told, ensure_ascii=False), highlight=False)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A run among several: its place in words, its size, the size of what comes after it, when it began."""

    where: str
    work: float
    ahead: float
    begun_s: float


class _Clock(ProgressColumn):
    """Returns elapsed and remaining time of the whole run, read anew at every refresh."""

    max_refresh = 0.5

    def __init__(self, progress: LiveProgress):
        super().__init__(table_column=Column(no_wrap=True))
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.clock(), style="dim")


def _amount(value: float) -> str:
    """A count as people read it at a glance: 950, 12k, 3.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size * (10 if letter == "k" else 1):
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
