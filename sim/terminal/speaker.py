"""What commands say to whoever started them: lines for people, lines of JSON for programs, or next to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from untether.sim.core.errors import UserError

if TYPE_CHECKING:
    from untether.sim.launch.progress import Voice
    from untether.sim.run.directory import RunDirectory

class Speaker:
    """Speaks on `file` (default: standard output) in one `voice`."""

    def __init__(self, voice: Voice, file: IO[str] | None = None):
        from untether.sim.launch.progress import make_console

        self.voice, self.console = voice, make_console(file)

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Prints a line for people, or an event with its facts for programs."""
        from untether.sim.launch.progress import say_event

        if self.voice == "json":
            say_event(self.console, event, **facts)
        elif self.voice == "lines":
            self.console.print(text, soft_wrap=True, markup=False)

    def expected(self, directory: RunDirectory) -> None:
        """Prints what the run will take, by a short measurement where none is kept."""
        if self.voice == "quiet" or directory.finished:
            return
        from untether.sim.launch import speed
        from untether.sim.launch.estimate import estimate
        from untether.sim.launch.resources import Resources

        experiment = directory.experiment
        found = speed.kept(experiment)
        if found is None:
            self.say("measuring", "measuring this machine, once for these models ...")
            try:
                found = speed.measure(experiment)
            except UserError as error:  # the run says it better, if it matters
                self.say("unmeasured", f"no estimate: {error}", reason=str(error))
                return
        workers = Resources.of(experiment, experiment.population.users).workers
        taken = estimate(experiment, found, workers)
        self.say(
            "expected", taken.sentence(), seconds=round(taken.total_s), disk_bytes=round(taken.disk_bytes),
            cloud_tokens=[round(count) for count in taken.cloud_tokens], price=round(taken.price, 4),
        )

    def done(self, directory: RunDirectory) -> None:
        """Prints the table of a finished run, and where it is."""
        from untether.sim.launch.progress import say_event

        report = directory.path / "report.html"
        if self.voice == "quiet":
            self.console.print(str(directory.path), soft_wrap=True, markup=False)
        elif self.voice == "json":
            summary = directory.read_json("summary.json") or {}
            say_event(self.console, "done", run=str(directory.path), report=str(report), rows=summary.get("rows", []))
        else:
            from untether.sim.launch.console import arms_table

            self.console.print(arms_table(directory.read_json("summary.json")))
            self.console.print(f"run directory: {directory.path}", soft_wrap=True, markup=False)
            self.console.print(f"report:        {report}", soft_wrap=True, markup=False)

    def study_done(self, folder: Path) -> None:
        """Prints a finished study's findings, and where it is."""
        from untether.sim.launch.progress import say_event

        report = folder / "report.html"
        if self.voice == "quiet":
            self.console.print(str(folder), soft_wrap=True, markup=False)
            return
        findings = (folder / "findings.md").read_text(encoding="utf-8")
        if self.voice == "json":
            say_event(self.console, "done", study=str(folder), report=str(report), findings=findings)
            return
        self.console.print(findings, markup=False)
        self.console.print(f"study:  {folder}", soft_wrap=True, markup=False)
        self.console.print(f"report: {report}", soft_wrap=True, markup=False)
