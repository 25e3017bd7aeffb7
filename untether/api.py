"""Runs from Python: in a script, or in a notebook, whose kernel, output and signals are not changed.

The coordinator works in a thread of its own. So the caller may be interrupted while it waits, may itself be any thread,
and may have an event loop running.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil
from rich.console import Console

from untether.sim.core.errors import Failure, ResumableStop, UserError
from untether.sim.experiment import Experiment, fields
from untether.sim.launch.progress import LiveProgress
from untether.sim.launch.runtime import GRACE_S, carry_out, prepare, reopen
from untether.sim.run.directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Callback", "Experiment", "Failure", "ResumableStop", "Run", "UserError", "open", "run"]


class Callback(Protocol):
    """Receives the events of a run, in this process. An error that it raises stops the run, which can be resumed."""

    def on_start(self, run: Run) -> None:
        """Is called before the first round that is still to do; in the caller's thread, as `on_end`."""

    def on_round(self, seed: int, round: int, facts: Mapping[str, Any]) -> None:
        """Is called when a round is committed, in the coordinator's thread; `facts["totals"]` counts the work done in
        it.
        """

    def on_end(self, run: Run) -> None:
        """Is called when tables and report are written."""


class Run:
    """A run directory, read as pandas frames, a fresh one each time. Tables raise UserError until the run is finished.
    """

    def __init__(self, directory: RunDirectory):
        self._directory = directory

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment."""
        return self._directory.experiment

    @property
    def finished(self) -> bool:
        """Whether tables and report are written."""
        return self._directory.finished

    @property
    def metrics(self) -> pd.DataFrame:
        """A row a seed, round, device, arm, task and metric."""
        return self._table("metrics")

    @property
    def predictions(self) -> pd.DataFrame:
        """A row an answered query."""
        return self._table("predictions")

    @property
    def samples(self) -> pd.DataFrame:
        """A row a synthetic sample, with the filters' verdict."""
        return self._table("samples")

    @property
    def events(self) -> pd.DataFrame:
        """A row a thing that took time: requests, training, answers, and what became of them."""
        return self._table("events")

    @property
    def ledger(self) -> pd.DataFrame:
        """A row an item that a device uploaded."""
        return self._table("ledger")

    @property
    def training(self) -> pd.DataFrame:
        """Losses, thinned."""
        return self._table("training")

    @property
    def summary(self) -> pd.DataFrame:
        """A row a task, arm, metric and, where arms are compared, reference."""
        import pandas as pd

        return pd.DataFrame(self._whole().read_json("summary.json")["rows"])

    @property
    def report(self) -> Path:
        """The path of report.html, one self-contained page."""
        return self._whole().path / "report.html"

    def adapter(
        self, device: str, arm: str = "collaborative", seed: int | None = None, out: str | Path | None = None
    ) -> Path:
        """Writes one device's adapter as a PEFT folder, which `PeftModel.from_pretrained` loads, and returns its path.

        Args:
            device: The device's id.
            arm: The arm that trained it.
            seed: By default the run's first.
            out: By default a folder under `exported/` of the run directory.

        Raises:
            UserError: Device, arm or seed is not in the run; the message names those that are.
        """
        from untether.clients.stores.export import export_adapter

        seed = self.experiment.seeds[0] if seed is None else seed
        folder = Path(out) if out is not None else self.path / "exported" / f"seed-{seed}" / device / arm
        return export_adapter(self._directory, device, arm, folder, seed)

    def _table(self, name: str) -> pd.DataFrame:
        return self._whole().read(name)

    def _whole(self) -> RunDirectory:
        if not self.finished:
            raise UserError(f"{self.path}: the run is not finished. Go on with it: {_again(self.path)}")
        return self._directory

    def __repr__(self) -> str:
        return f"<untether run {self.path}, {'finished' if self.finished else 'not finished'}>"

    def _repr_html_(self) -> str:
        if not self.finished:
            return f"<p>{escape(repr(self))}</p>"
        rows = self.summary
        means = rows[rows["reference"].isna()].pivot(index="arm", columns=["task", "metric"], values="mean")
        where = f'<p>{escape(str(self.path))}: <a href="{self.report.resolve().as_uri()}">report.html</a></p>'
        return means.to_html(float_format="{:.3f}".format, na_rep="") + where


def open(path: str | Path) -> Run:
    """Returns the run in a run directory.

    Raises:
        UserError: There is none.
    """
    return Run(RunDirectory.open(path))


def run(
    experiment: Experiment | Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Runs an experiment and returns its results.

    Args:
        experiment: An experiment, a TOML file, or fields.
        out: The run directory; None: the first of `runs/NAME`, `runs/NAME-2`, ... that is free. If it holds a run of
            this experiment, or no experiment is given, that run is resumed, or returned if it is finished.
        callbacks: Receive the run's events.
        progress: Whether lines are printed.
        settings: Fields, which override those of `experiment`: dotted (`{"lora.rank": 4}`) or by section
            (`lora={"rank": 4}`), with values or texts as `--set` takes them.

    Returns:
        The finished run.

    Raises:
        UserError: A mistake in the experiment or the input.
        ResumableStop: The cloud is unreachable, a disk is full or a callback failed; the message says how to resume.
        KeyboardInterrupt: Ctrl-C. What was committed before counts; nothing of the run is left running.
        Failure: A defect.
    """
    directory = _directory(_experiment(experiment, settings), None if out is None else Path(out).expanduser())
    made = Run(directory)
    if directory.finished:
        return made
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise UserError("Ray is in use in this process, by another run or by yourself: call ray.shutdown() first")
    console = None if progress else Console(file=io.StringIO(), quiet=True)
    try:
        _tell(callbacks, "on_start", made)
        teller = _Teller(directory, callbacks, console)
        with teller:
            _in_a_thread(directory, teller)
        _tell(callbacks, "on_end", made)
    except ResumableStop as stop:
        raise ResumableStop(f"{stop}\nGo on with it: {_again(directory.path)}") from stop.__cause__
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Go on with the run: {_again(directory.path)}") from None
    return made


def _experiment(
    given: Experiment | Mapping[str, Any] | str | Path | None, settings: Mapping[str, Any]
) -> Experiment | None:
    """The experiment that is meant; None where nothing is given."""
    if given is None and not settings:
        return None
    dotted = dict(_dotted(given)) if isinstance(given, Mapping) else {}
    path = given if isinstance(given, (str, Path)) else None
    whole = given if isinstance(given, Experiment) else Experiment.read(path)
    changes = {**dotted, **dict(_dotted(settings))}
    return Experiment.build(whole.model_dump(exclude_unset=True), changes, "the experiment given")


def _dotted(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = {name for name, _, _ in fields()}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known:
            yield from _dotted(value, f"{name}.")
        else:
            yield name, value


def _directory(experiment: Experiment | None, out: Path | None) -> RunDirectory:
    if out is None or not (out / "experiment.toml").exists():
        return prepare(experiment or Experiment(), out)
    found = RunDirectory.open(out)
    if not found.finished:
        return reopen(out, experiment)
    found.check_resumable(experiment)
    return found


def _in_a_thread(directory: RunDirectory, teller: _Teller) -> None:
    """Has the run carried out, and raises what ended it; after Ctrl-C, KeyboardInterrupt once the run has ended."""
    stop, ended = threading.Event(), threading.Event()  # an interrupted `Thread.join` forgets the thread (Python 3.11)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            carry_out([directory], teller, stop)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=work, name="untether", daemon=True).start()
        ended.wait()
    except KeyboardInterrupt:
        stop.set()
        if not ended.wait(GRACE_S):  # a host waits for its worker, and Flower for the host
            _end_workers()
            ended.wait()
        raise
    if teller.interrupted:
        raise KeyboardInterrupt
    if errors:
        raise errors[0]


def _end_workers() -> None:
    """Kills Ray's workers among this process's children, and no other child."""
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::" in " ".join(child.cmdline()[:1]):
                child.kill()
        except psutil.Error:
            pass


class _Teller(LiveProgress):
    """Shows the run, and tells the callbacks of each round that is committed."""

    def __init__(self, directory: RunDirectory, callbacks: Sequence[Callback], console: Console | None):
        super().__init__(console)
        self._directory, self._callbacks, self._begun = directory, callbacks, (0, 0)
        self.interrupted = False

    def begin(self, seed: int, round: int) -> None:
        super().begin(seed, round)
        self._begun = (seed, round)

    def end(self) -> None:
        super().end()
        commit = self._directory.committed(*self._begun)
        try:
            _tell(self._callbacks, "on_round", *self._begun, commit["facts"] if commit else {})
        except KeyboardInterrupt:  # in this thread Flower would lose it
            self.interrupted = True
            raise ResumableStop("interrupted") from None


def _tell(callbacks: Sequence[Callback], what: str, *words: Any) -> None:
    for callback in callbacks:
        call: Callable[..., None] = getattr(callback, what)
        try:
            call(*words)
        except Exception as error:
            where = f" (seed {words[0]}, round {words[1]})" if what == "on_round" else ""
            raise ResumableStop(
                f"the callback {type(callback).__name__}.{what}{where} failed: {type(error).__name__}: {error}"
            ) from error


def _again(path: Path) -> str:
    return f"untether.run(out={str(path)!r})"
