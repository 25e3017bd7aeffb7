"""The run directory: a contract with other tools, which read it.

A round is *staged* as Parquet parts, one a table and shard, and *committed* by one atomic file
(`state/commits/seed-S-round-R.json`) that names the parts which count. What no commit names is ignored, so a killed run
resumes from its last commit. When the run ends, the parts become the tables of the contract.

Within a round, a *receipt* records which parts a finished shard wrote and its reply, so that the shard is not run again
when the round is; a receipt makes no part count.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from untether.sim.core.durable import make_folder, possible, write_atomically, written
from untether.sim.core.errors import UserError
from untether.sim.core.records import Part
from untether.sim.experiment import Experiment
from untether.sim.population.source import device_id
from untether.sim.run.tables import ORDER, SCHEMA_VERSION, STAGED, TABLES, TRUTH, table_writer, write_rows
from untether.sim.run.whole import REMEDY, commit_of, damaged, is_whole, read_json, read_table, refuse_code, to_json

if TYPE_CHECKING:
    import pandas as pd


def versions() -> dict[str, str]:
    """Returns the versions that a run directory and the program that resumes it must share."""
    try:
        program = importlib.metadata.version("untether")
    except importlib.metadata.PackageNotFoundError:
        program = "unknown"
    return {"untether": program, "schema_version": SCHEMA_VERSION}


class RunDirectory:
    """One run on disk. Cheap to construct; workers and the coordinator each hold their own on the same path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, experiment: Experiment) -> RunDirectory:
        """Creates a run directory that holds the resolved experiment.

        Raises:
            UserError: The path holds another run.
        """
        run = cls(possible(path))
        if (run.path / "experiment.toml").exists():
            raise UserError(f"{run.path} already holds a run. Give another --out, or go on with --resume {run.path}")
        try:
            make_folder(run.path / "state")
        except OSError as error:
            raise UserError(f"{run.path}: cannot make this folder: {error.strerror}. Give another --out") from error
        run.write_json("state/versions.json", versions())
        run._write_experiment(experiment)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Opens an existing run directory.

        Raises:
            UserError: There is none.
        """
        run = cls(possible(path))
        if not (run.path / "experiment.toml").is_file():
            raise UserError(f"{run.path}: not a run directory (no experiment.toml in it)")
        return run

    def check_resumable(self, experiment: Experiment | None = None) -> None:
        """Checks that this run can be resumed.

        Fields of `[engine]` and the place of kept answers may differ: they change the speed, never the numbers. But
        who learns stays.

        Raises:
            UserError: It is of another version or of another experiment; the message names the difference.
        """
        made, here = self.read_json("state/versions.json") or {}, versions()
        differing = [f"{name} {made.get(name, 'unknown')} there, {here[name]} here" for name in here
                     if made.get(name) != here[name]]  # fmt: skip
        if differing:
            raise UserError(
                f"{self.path} was made by another version: {'; '.join(differing)}. "
                "Go on with the version that made it, or start anew with --out"
            )
        changes = differences(self.experiment, experiment) if experiment is not None else []
        free = [line for line in changes if line.startswith(("engine.", "cloud.cache:"))]
        changes = [line for line in changes if line not in free or line.startswith("engine.learners:")]
        if changes:
            raise UserError(
                f"{self.path} holds another experiment:\n  " + "\n  ".join(changes)
                + "\nResume it as it is with --resume alone, or start anew with --out"
            )

    def take_over(self, experiment: Experiment) -> None:
        """Writes the experiment of a resuming run; `check_resumable` decides which fields may differ."""
        if experiment != self.experiment:
            self._write_experiment(experiment)

    def _write_experiment(self, experiment: Experiment) -> None:
        """The experiment, and the sum of its text: a file that was cut at a line's end is still TOML."""
        text = experiment.to_toml()
        write_atomically(self.path / "state" / "experiment.sha256", hashlib.sha256(text.encode()).hexdigest())
        write_atomically(self.path / "experiment.toml", text)

    def check_state(self) -> None:
        """Raises UserError, naming the file, where what an unfinished run goes on from is damaged or gone."""
        path = self.path / "experiment.toml"
        kept = self.path / "state" / "experiment.sha256"
        if kept.exists() and kept.read_text(errors="replace").strip() != hashlib.sha256(path.read_bytes()).hexdigest():
            raise damaged(path, f"it is not what the run began with, by its sum in state/{kept.name}")
        if self.finished:
            return
        experiment = self.experiment
        for seed in experiment.seeds:
            done = [self.committed(seed, round) for round in range(experiment.rounds)]
            last = max((round for round, commit in enumerate(done) if commit), default=-1)
            for round, commit in enumerate(done[: last + 1]):
                if commit is None:
                    raise UserError(f"{self._commit_path(seed, round)}: this file of the run is gone. {REMEDY}")
                for name in (part for parts in commit["parts"].values() for part in parts):
                    if not is_whole(self.path / name):
                        raise damaged(self.path / name, "it cannot be read to its end")
            if self._carried_path(seed, last + 1).exists():  # written before its commit, which deletes the one before
                if last >= 0 and not self._carried_path(seed, last).exists():
                    raise UserError(f"{self._commit_path(seed, last + 1)}: this file of the run is gone. {REMEDY}")
            elif 0 <= last < experiment.rounds - 1:
                read_json(self._carried_path(seed, last))

    @property
    def finished(self) -> bool:
        """Whether tables and report are written."""
        return (self.path / "state" / "finished.json").exists()

    @property
    def experiment(self) -> Experiment:
        """The resolved experiment of this run."""
        refuse_code(self.path / "experiment.toml")
        return Experiment.read(self.path / "experiment.toml")

    # --- staging and committing -------------------------------------------------------------------------------

    def write_part(self, table: str, seed: int, round: int, part: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Stages rows of one table, as they come: a large fleet's need not be in memory.

        Writing the same part again replaces it, so that a shard may be retried. Missing columns become null.

        Args:
            table: Name of the table.
            seed, round: Of the rows.
            part: Names the shard.
            rows: The rows.

        Returns:
            The part's path relative to the run directory.
        """
        schema = (TABLES | STAGED)[table]
        relative = f"state/parts/seed-{seed}/round-{round}/{table}/{part}.parquet"
        with written(self.path / relative) as temporary:
            write_rows(temporary, schema, {"seed": seed, "round": round}, rows)
        return relative

    def read_parts(self, parts: Iterable[str]) -> pd.DataFrame:
        """Returns the rows of staged or committed parts as one frame."""
        import pandas as pd  # half a second, which hosts of devices need not wait for

        frames = [read_table(self.path / part).to_pandas() for part in parts]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def read_rows(self, parts: Iterable[str], devices: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Returns the rows of staged or committed parts, of all devices or of some."""
        only = None if devices is None else [("device_id", "in", list(devices))]
        return [row for part in sorted(parts) for row in read_table(self.path / part, filters=only).to_pylist()]

    def replace_rows(self, parts: Sequence[str], devices: Collection[int], by: Sequence[str]) -> list[str]:
        """Returns staged parts without the rows of some devices, and the parts `by` that hold those instead."""
        gone, kept = pa.array([device_id(device) for device in devices]), []
        for part in parts:
            table = read_table(self.path / part)
            rest = table.filter(pc.invert(pc.is_in(table.column("device_id"), gone)))
            if len(rest) < len(table):
                part = part.removesuffix(".parquet") + ".rest.parquet"
                self._write_table(rest, self.path / part)
            kept.append(part)
        return [*kept, *by]

    def read_table(self, parts: Iterable[str], devices: Collection[str] | None = None) -> pa.Table | None:
        """Returns the rows as `read_rows` does, by column; None where there is no part."""
        only = None if devices is None else [("device_id", "in", list(devices))]
        tables = [read_table(self.path / part, filters=only) for part in sorted(parts)]
        return pa.concat_tables(tables) if tables else None

    @staticmethod
    def parts(seed: int, round: int, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Returns the paths of staged parts, relative to the run directory, from their names by table."""
        folder = f"state/parts/seed-{seed}/round-{round}"
        return {table: [f"{folder}/{table}/{name}.parquet" for name in found] for table, found in names.items()}

    @staticmethod
    def named(paths: Iterable[str]) -> tuple[Part, ...]:
        """Returns the names of parts for messages, which carry no path."""
        found = (Path(path) for path in paths)
        return tuple(Part(int(p.parts[-3].removeprefix("round-")), p.name.removesuffix(".parquet")) for p in found)

    def samples(
        self, seed: int, round: int, parts: Mapping[str, Sequence[str]], this_round: bool = False
    ) -> tuple[Part, ...]:
        """Returns the parts with the samples that devices may train on in `round`.

        Args:
            seed, round: The round.
            parts: Those of the round itself, still staged.
            this_round: Whether to leave out those of earlier rounds, which are included where devices use them again.
        """
        experiment, staged = self.experiment, parts.get("samples", [])
        if this_round or experiment.drift.samples == "refresh" and experiment.network.fallback != "stale_samples":
            return self.named(staged)
        commits = [self.committed(seed, past) for past in range(round)]
        return self.named([p for commit in commits if commit for p in commit["parts"].get("samples", [])] + [*staged])

    def commit(
        self, seed: int, round: int, parts: Mapping[str, Sequence[str]], facts: Mapping[str, Any],
        carried: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Commits a staged round by one atomic file.

        Args:
            seed, round: The round.
            parts: Names of parts by table.
            facts: Small JSON kept with it.
            carried: The state that the next round starts from.
        """
        if carried is not None:
            write_atomically(self._carried_path(seed, round), json.dumps(carried))
        text = json.dumps({"parts": {table: sorted(paths) for table, paths in parts.items()}, "facts": dict(facts)})
        write_atomically(self._commit_path(seed, round), text)
        self._carried_path(seed, round - 1).unlink(missing_ok=True)

    def committed(self, seed: int, round: int) -> dict[str, Any] | None:
        """Returns the commit of a round, or None."""
        path = self._commit_path(seed, round)
        return commit_of(path) if path.exists() else None

    def carried(self, seed: int, round: int) -> dict[str, Any] | None:
        """Returns the state that the round after `round` starts from; None before the first."""
        path = self._carried_path(seed, round)
        return read_json(path) if path.exists() else None

    def _carried_path(self, seed: int, round: int) -> Path:
        return self.path / "state" / "carried" / f"seed-{seed}-round-{round}.json"

    def _commit_path(self, seed: int, round: int) -> Path:
        return self.path / "state" / "commits" / f"seed-{seed}-round-{round}.json"

    def write_receipt(self, seed: int, round: int, name: str, reply: Mapping[str, Any]) -> None:
        """Keeps the reply of a finished shard of an unfinished round; `name` is the pass and the shard."""
        write_atomically(self._receipt_path(seed, round, name), json.dumps(dict(reply)))

    def read_receipt(self, seed: int, round: int, name: str) -> dict[str, Any] | None:
        """Returns the reply of a shard that was finished before, if all its parts exist."""
        try:
            reply = json.loads(self._receipt_path(seed, round, name).read_text(encoding="utf-8"))
            found = self.parts(seed, round, reply["parts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # the shard is run again
        return reply if all(is_whole(self.path / part) for paths in found.values() for part in paths) else None

    def _receipt_path(self, seed: int, round: int, name: str) -> Path:
        return self.path / "state" / "parts" / f"seed-{seed}" / f"round-{round}" / "receipts" / f"{name}.json"

    # --- finishing and reading ----------------------------------------------------------------------------------

    def merge(self, experiment: Experiment, truth: Mapping[tuple[str, str, str], str] | None = None) -> None:
        """Turns the committed parts into the tables of the contract, a round at a time (bounded memory).

        Args:
            experiment: The run's experiment.
            truth: How the embedded world's generator made each sample, by (task, input, output).
        """
        for table, schema in TABLES.items():
            target = self.path / f"{table}.parquet"
            with written(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for seed in experiment.seeds:
                    for round in range(experiment.rounds):
                        commit = self.committed(seed, round)
                        paths = commit["parts"].get(table, []) if commit else []
                        if not paths:
                            continue
                        rows = pa.concat_tables([read_table(self.path / path) for path in paths])
                        if table == "samples" and truth:
                            texts = zip(*(rows.column(c).to_pylist() for c in ("task", "input", "output")), strict=True)
                            known = pa.array(map(truth.get, texts), pa.string())
                            rows = rows.set_column(schema.get_field_index("truth"), "truth", known)
                        order = [(name, "ascending") for name in ORDER if name in schema.names]
                        writer.write_table(rows.cast(schema).sort_by(order))

    def write_truth(self, batches: Iterable[Sequence[Mapping[str, Any]]]) -> None:
        """Writes `truth.parquet`, a batch of rows at a time."""
        target = self.path / "truth.parquet"
        with written(target) as temporary, pq.ParquetWriter(temporary, TRUTH, compression="zstd") as writer:
            for rows in batches:
                writer.write_table(pa.Table.from_pylist(list(rows), schema=TRUTH))

    def read(self, table: str, columns: Sequence[str] | None = None, fixed: bool = False) -> pd.DataFrame:
        """Returns a finished table, or some of its columns, as a pandas frame. Texts are most of a large fleet's table.

        A column that an earlier version of the program did not write is null. `fixed`: the frame cannot be changed in
        place, and the table is not in memory twice.
        """
        path = self.path / f"{table}.parquet"
        names = list(columns) if columns is not None else TABLES[table].names if table in TABLES else None
        if names is None and path.exists():
            return read_table(path).to_pandas()
        names = names or []
        try:
            there = set(pq.read_schema(path).names)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(path, error) from error
        found = read_table(path, columns=[name for name in names if name in there])
        try:
            kinds = [TABLES[table].field(name) for name in found.schema.names] if table in TABLES else found.schema
            found = found.cast(pa.schema(kinds))
        except (KeyError, pa.ArrowException) as error:
            raise damaged(path, f"a column is of another kind than untether writes: {error}") from error
        if table == "metrics" and "value" in names:
            values = found.column("value") if "value" in there else pa.array([None])
            if values.null_count or not pc.all(pc.is_finite(values)).as_py() and len(values):
                raise damaged(path, "a value in it is no number")
        frame = found.to_pandas(split_blocks=fixed, self_destruct=fixed)
        return frame if list(frame) == names else frame.reindex(columns=names)

    def drop_parts(self) -> None:
        """Deletes the staged parts once the tables hold their rows (the commits stay: the run is finished)."""
        self.write_json("state/finished.json", {"schema_version": SCHEMA_VERSION})
        shutil.rmtree(self.path / "state" / "parts", ignore_errors=True)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run directory atomically."""
        write_atomically(self.path / name, to_json(value))

    def read_json(self, name: str) -> Any:
        """Returns a JSON file of the run directory; None where it does not exist.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path / name
        return read_json(path) if path.exists() else None

    def _write_table(self, table: pa.Table, path: Path) -> None:
        with written(path) as temporary, table_writer(temporary, table.schema) as writer:
            writer.write_table(table)


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Returns the fields in which two experiments differ, as `field: value there, value here`."""
    return list(_differing("", old.model_dump(), new.model_dump()))


def _differing(prefix: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differing(f"{prefix}.{name}" if prefix else name, old.get(name), new.get(name))
    elif old != new:
        yield f"{prefix}: {_shown(old)} there, {_shown(new)} here"


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
