"""Bandwidth logs in CSV, by a stated map of columns: 5G and Lumos logs, and whatever a measuring app writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from untether.sim.core.errors import UserError, unknown
from untether.sim.time.network.bandwidth import Log, log_of_rates

RATES = {"mbps": 1e6, "kbps": 1e3, "bps": 1.0}
TIMES = {"s": 1.0, "ms": 1e-3}
LATENCIES = {"ms": 1e-3, "s": 1.0}
ROLES: Mapping[str, Mapping[str, float]] = {"time": TIMES, "down": RATES, "latency": LATENCIES}
"""What a column may be, and its units; the first is meant where none is named."""

_STAMPS = ("%Y.%m.%d_%H.%M.%S", "%Y-%m-%d %H:%M:%S.%f", "%Y-%m-%d %H:%M:%S", "%d/%m/%Y %H:%M:%S")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises UserError, saying what there is, for a map that cannot be followed."""
    for role, said in columns.items():
        if role not in ROLES:
            raise UserError(f"network.columns: {unknown('column', role, ROLES)}")
        _, _, unit = said.partition(":")
        if unit and unit.lower() not in ROLES[role]:
            raise UserError(f"network.columns.{role} = {said!r}: {unknown('unit', unit, ROLES[role])}")
    if columns and not {"time", "down"} <= set(columns):
        raise UserError("network.columns must say at least which column is `time` and which is `down`")


def read_csv(file: Path, columns: Mapping[str, str]) -> Log:
    """Returns one log. A row's rate holds until the next row's time, the last one's as long as the one before; rows of
    the same time are averaged. Raises UserError naming file, line and column for what is wrong.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        heads = [head.strip() for head in reader.fieldnames or ()]
        reader.fieldnames = heads
        names = {role: said.partition(":")[0] for role, said in columns.items()}
        for role, name in names.items():
            if name not in heads:
                raise UserError(f"{file}: network.columns.{role}: {unknown('column', name, heads)}")
        rows = [
            tuple(_value(file, number, role, columns[role], row[names[role]]) for role in names)
            for number, row in enumerate(reader, 2)
            if (row[names["down"]] or "").strip() not in ("", "-")
        ]
    roles = list(names)
    by_time: dict[float, list[tuple[float, ...]]] = {}
    for row in rows:
        by_time.setdefault(row[roles.index("time")], []).append(row)
    if len(by_time) < 2:
        raise UserError(f"{file}: {len(by_time)} moments; a log needs two at least: a rate holds until the next")
    times = sorted(by_time)
    rates = [_mean(by_time[time], roles.index("down")) for time in times]
    durations = [after - before for before, after in zip(times, times[1:], strict=False)]
    durations.append(durations[-1])
    latency = None
    if "latency" in roles:
        each = [_mean(by_time[time], roles.index("latency")) for time in times]
        latency = sum(d * s for d, s in zip(durations, each, strict=True)) / sum(durations)
    log = log_of_rates(file.name, durations, rates, latency)
    if log.bits[-1] <= 0:
        raise UserError(f"{file}: column {names['down']} is always 0: not a bit passes in the whole log. Leave it out")
    return log


def columns_of(file: Path) -> list[str]:
    """Returns the names in a CSV file's first line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [head.strip() for head in next(csv.reader(lines), [])]


def _value(file: Path, line: int, role: str, said: str, text: str | None) -> float:
    name, _, unit = said.partition(":")
    units = ROLES[role]
    factor = units[unit.lower()] if unit else next(iter(units.values()))
    text = (text or "").strip()
    try:
        value = float(text) * factor
    except ValueError:
        value = _moment(text) if role == "time" else -1.0
    if not 0 <= value < 1e15:
        raise UserError(f"{file}, line {line}: {name} = `{text}`: it must be a number, 0 or above")
    return value


def _moment(text: str) -> float:
    """Seconds since 1970 of a time stamp; -1 where it is none."""
    for form in _STAMPS:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return -1.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _mean(rows: list[tuple[float, ...]], place: int) -> float:
    return sum(row[place] for row in rows) / len(rows)
