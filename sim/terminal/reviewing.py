"""A person decides on a run's synthetic samples, one key each, beside what the user wrote: `untether review`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.population.order import known_history
from untether.sim.population.source import device_id, open_population
from untether.sim.run.directory import RunDirectory
from untether.sim.run.reviews import ACCEPT, REJECT, SKIP, Reviewed, ReviewFile

KEYS = {"a": ACCEPT, "r": REJECT, "s": SKIP}
UNDO, QUIT = "u", "q"
HELP = "a accept   r reject   s skip   u undo   q quit"
SHOWN = 4
"""Items of the user's own that are shown beside a sample, the latest."""

FILE = "reviews.jsonl"


@dataclass(frozen=True)
class Shown:
    """One sample to decide on: whose it is, what the filters said of it, and items of the user's own."""

    key: Reviewed
    device: str
    verdict: str
    own: Sequence[Interaction]


def run_review(directory: Path, device: str, out: Path | None) -> None:
    """Carries out the command: shows what is undecided, keeps what the keys say, prints a summary."""
    run = RunDirectory.open(directory)
    reviews = ReviewFile(out or run.path / FILE)
    console = Console(highlight=False)
    with closing(keys()) as pressed:
        decide(list(samples_of(run, device)), reviews, pressed, console)
    console.print(summary(run, reviews), soft_wrap=True)
    console.print(f"decisions: {reviews.path}", soft_wrap=True)


def samples_of(run: RunDirectory, device: str = "") -> Iterator[Shown]:
    """Yields the samples that devices received, in the order of the run. Raises UserError where there are none."""
    experiment = Experiment.read(run.path / "experiment.toml")
    samples = run.read("samples")
    known = sorted(set(samples["device_id"]))
    if device and device not in known:
        names = ", ".join(known) or "none"
        raise UserError(f"--device {device}: no samples of this device in {run.path}. Devices: {names}")
    if not len(samples):
        raise UserError(f"{run.path} has no synthetic samples. Review a finished run that asked the cloud")
    found = samples[samples["device_id"] == device] if device else samples
    for seed, theirs in found.groupby("seed", sort=False):
        population = open_population(experiment, int(seed))
        index = {device_id(number): number for number in range(len(population))}
        for (name, task), group in theirs.groupby(["device_id", "task"], sort=False):
            user = population.user(index[str(name)])
            own = known_history(user, str(task), 0, experiment.population.max_history)[-SHOWN:]
            for row in group.itertuples():
                key = Reviewed(user.user_id, str(task), row.input, row.output)
                yield Shown(key, str(name), row.verdict, own)


def decide(samples: Sequence[Shown], reviews: ReviewFile, pressed: Iterator[str], console: Console) -> None:
    """Shows what is undecided, one after the other, and keeps what the keys say, until all is decided or `q`."""
    place, order = 0, [shown for shown in samples if reviews.decision(shown.key) is None]
    while place < len(order):
        console.print(card(order[place], place + 1, len(order)))
        for pressed_key in pressed:
            key = pressed_key.lower()
            if key in KEYS:
                reviews.decide(order[place].key, KEYS[key])
                console.print(KEYS[key])
                place += 1
                break
            if key == UNDO and place:
                place -= 1
                reviews.undo(order[place].key)
                console.print("undone")
                break
            if key == QUIT:
                return
            console.print("nothing to undo" if key == UNDO else HELP)
        else:
            return  # no more keys


def card(shown: Shown, number: int, of: int) -> Text:
    """Returns one sample as text: the user's own items, then the sample. The filters' verdict is not shown: it would
    lead.
    """
    text = Text(f"\n{number}/{of}  {shown.device}  {shown.key.task}\n", style="bold")
    for item in shown.own:
        text.append(f"  own     {_line(item.input)}\n       -> {_line(item.output)}\n", style="dim")
    sample = f"  sample  {_line(shown.key.input, 600)}\n       -> {_line(shown.key.output, 600)}\n"
    text.append(sample, style="not bold")
    text.append(HELP, style="dim not bold")
    return text


def summary(run: RunDirectory, reviews: ReviewFile) -> str:
    """Returns how many samples were decided on, and how far the filters agree."""
    table = run.read("samples")
    made = {
        Reviewed(row.user_id, row.task, row.input, row.output): row.verdict == "accepted" for row in table.itertuples()
    }
    both = [(made[key], said == ACCEPT) for key, said in reviews.items() if key in made and said in (ACCEPT, REJECT)]
    skipped = sum(said == SKIP for _, said in reviews.items())
    accepted = sum(mine for _, mine in both)
    counts = f"{accepted} accepted, {len(both) - accepted} rejected; {skipped} skipped."
    said = f"{len(both)} of {len(made)} samples decided: {counts}"
    if not both:
        return said
    same = sum(filters == mine for filters, mine in both) / len(both)
    return f"{said} The filters decided alike on {same:.0%} of them."


def keys() -> Iterator[str]:
    """Yields key presses of the terminal, one at a time; of a pipe, its characters. Ctrl-C and the end of the input end
    it.
    """
    if not sys.stdin.isatty():
        while (key := sys.stdin.read(1)) != "":
            if not key.isspace():
                yield key
        return
    with _key_by_key(sys.stdin.fileno()):
        while (key := sys.stdin.read(1)) not in ("", "\x00", "\x03", "\x04"):  # NUL: a Ctrl-D that was typed ahead
            yield key


@contextmanager
def _key_by_key(descriptor: int) -> Iterator[None]:
    """Holds a terminal in a mode without lines for as long as keys are read: between two modes the kernel would take a
    Ctrl-D for the end of a line.
    """
    import termios
    import tty

    before: list[Any] = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)  # what was typed ahead counts
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _line(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
