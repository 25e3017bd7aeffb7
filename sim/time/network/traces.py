"""Reads public trace formats: each is recognised by its shape, checked, and turned into a log or a state trace.

- sabre: a JSON list of {"duration_ms", "bandwidth_kbps", "latency_ms"} (github.com/UMass-LIDS/sabre);
- Pensieve: lines of `seconds Mbit/s` (github.com/hongzimao/pensieve);
- mahimahi: a line a slot of 1,500 bytes, its millisecond; played again after the last (github.com/ravinet/mahimahi);
- FLASH: JSON with `messages`, lines of `date time<TAB>state` a device (github.com/PKU-Chengxu/FLASH).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from untether.sim.core import strict_json
from untether.sim.core.clock import DAY_S
from untether.sim.core.errors import UserError
from untether.sim.time.network.bandwidth import Log, log_of_rates
from untether.sim.time.network.csv_log import check_columns, columns_of, read_csv

SLOT_BITS = 1500 * 8
LEAST_MS, MOST = 1e-6, 1e15
"""Below which no duration, and above which no figure of a log makes sense."""
SKIPPED = ("LICENSE", "README", "LICENCE", "COPYING")

CONNECTED = frozenset({"wifi", "2g", "3g", "4g", "5g"})


@dataclass(frozen=True, slots=True)
class StateTrace:
    """The states of a phone, from midnight of its first day, as windows (start_s, end_s).

    They are those in which it was connected, on Wi-Fi, charging, and idle (screen off or locked). `period_s` is a whole
    number of days.
    """

    name: str
    period_s: float
    connected: tuple[tuple[float, float], ...]
    wifi: tuple[tuple[float, float], ...]
    charging: tuple[tuple[float, float], ...]
    idle: tuple[tuple[float, float], ...]


class NoTrace(UserError):
    """A file in no format that is known. Beside traces it is left out, with a warning."""


def read_traces(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Log | StateTrace]:
    """Reads all traces of a file or of a folder (and the folders in it), in the order of their names, of one kind.

    Args:
        path: A file or a folder.
        columns: What the columns of CSV logs are (`network.columns`).

    Raises:
        UserError: The path does not exist, a file is no trace, a folder is empty, or logs are mixed with state traces.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"network.traces = `{path}`: no such file or folder")
    hidden = [p for p in sorted(root.rglob("*")) if p.is_file()] if root.is_dir() else [root]
    files = [p for p in hidden if not p.name.startswith(".") and not p.name.upper().startswith(SKIPPED)]
    check_columns(columns or {})
    traces: list[Log | StateTrace] = []
    odd: list[NoTrace] = []
    for file in files:
        try:
            traces += read_trace(file, columns)
        except NoTrace as error:
            odd.append(error)
    if odd and not traces:
        raise odd[0]
    if odd:
        names = sorted(str(error).split(":", 1)[0] for error in odd)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"network.traces: left out, in no trace format that is known: {names[0]}{more}", stacklevel=2)
    if not traces:
        raise UserError(f"network.traces = `{path}`: no trace in it. Give a log, or a folder of logs")
    if len({type(trace) for trace in traces}) > 1:
        raise UserError(f"network.traces = `{path}`: bandwidth logs and state traces together. Give one kind")
    return traces


def read_trace(file: Path, columns: Mapping[str, str] | None = None) -> list[Log | StateTrace]:
    """Reads the traces of one file: one log, or a state trace for each device in it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a text file: {error}") from None
    if file.suffix.lower() == ".csv":
        if not columns:
            there = ", ".join(columns_of(file))
            raise UserError(f"{file}: a CSV log needs network.columns, which say what its columns are: {there}")
        return [read_csv(file, columns)]
    if text.lstrip()[:1] in ("[", "{"):
        return _json(file, text)
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    widths = {len(words) for _, words in lines}
    if widths == {2}:
        return [_pensieve(file, lines)]
    if widths == {1}:
        return [_mahimahi(file, lines)]
    raise NoTrace(
        f"{file}: no trace format that is known. Known: sabre JSON, Pensieve (`seconds Mbit/s` a line), mahimahi (a "
        "millisecond a line), FLASH JSON (`messages`), CSV (network.columns)"
    )


def _json(file: Path, text: str) -> list[Log | StateTrace]:
    try:
        data = strict_json.loads(text)
    except ValueError as error:
        try:  # one record a line
            data = [strict_json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise UserError(f"{file}: not JSON: {error}") from None
    if isinstance(data, dict):
        data = [data] if "messages" in data else list(data.values())
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        if "messages" in data[0]:
            return [_flash(file, number, item) for number, item in enumerate(data)]
        if "duration_ms" in data[0]:
            return [_sabre(file, data)]
    raise UserError(
        f"{file}: JSON, but no trace: a sabre log is a list of {{duration_ms, bandwidth_kbps, latency_ms}}, a FLASH "
        "trace an object (or several) with `messages`"
    )


def _sabre(file: Path, data: Sequence[dict[str, Any]]) -> Log:
    columns: dict[str, list[float]] = {}
    for name in ("duration_ms", "bandwidth_kbps", "latency_ms"):
        least, rule = (LEAST_MS, "above 0") if name == "duration_ms" else (0.0, "0 or above")
        values = [item.get(name) for item in data]
        for number, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < MOST:
                raise UserError(f"{file}, item {number}: {name} = {value!r}; it must be a number {rule}")
        columns[name] = values
    durations = [value / 1000 for value in columns["duration_ms"]]
    rates = [value * 1000.0 for value in columns["bandwidth_kbps"]]
    weighted = sum(d * latency for d, latency in zip(durations, columns["latency_ms"], strict=True))
    log = log_of_rates(file.name, durations, rates, weighted / sum(durations) / 1000)
    return _moving(f"{file}, items 0 to {len(data) - 1}", "bandwidth_kbps", log)


def _pensieve(file: Path, lines: Sequence[tuple[int, list[str]]]) -> Log:
    """A line's rate holds until the next line's time; the last one's as long as the one before."""
    times, rates = [], []
    for number, (time, rate) in lines:
        times.append(_number(file, number, time, "seconds"))
        rates.append(_number(file, number, rate, "Mbit/s") * 1e6)
        if len(times) > 1 and times[-1] <= times[-2]:
            raise UserError(
                f"{file}, line {number}: the time {time} does not rise above the line before. Each must: sort the file"
            )
    if len(times) < 2:
        raise UserError(
            f"{file}, line {lines[0][0]}: the only one. A Pensieve log needs two at least: a rate holds until the next"
        )
    durations = [after - before for before, after in zip(times, times[1:], strict=False)]
    log = log_of_rates(file.name, [*durations, durations[-1]], rates, None)
    return _moving(f"{file}, lines {lines[0][0]} to {lines[-1][0]}", "the second word (Mbit/s)", log)


def _mahimahi(file: Path, lines: Sequence[tuple[int, list[str]]]) -> Log:
    """Slots of one millisecond share it evenly: as many bits have passed at each whole millisecond as in mahimahi.

    The log is played again after its last millisecond, which is the next round's 0 (`src/frontend/link_queue.cc`: the
    base time grows by the last timestamp). Slots at 0 therefore pass with those of the last millisecond.
    """
    slots: dict[int, int] = {}
    last = 0
    for number, (word,) in lines:
        if not word.isdecimal() or len(word) > 15:
            raise UserError(
                f"{file}, line {number}: `{word}` is no millisecond. mahimahi has one whole number a line, of 15 "
                "digits at most"
            )
        if int(word) < last:
            raise UserError(
                f"{file}, line {number}: {word} ms lies before the line above it. Slots must be in order: sort the file"
            )
        last = int(word)
        slots[last] = slots.get(last, 0) + 1
    if last == 0:
        raise UserError(
            f"{file}, line {lines[-1][0]}: the last slot is at 0 ms, so the log takes no time and cannot be played "
            "again. A mahimahi log must last a millisecond at least: let its last line say when it ends"
        )
    slots[last] += slots.pop(0, 0)
    times, bits = [0.0], [0.0]
    for time, count in slots.items():
        if (time - 1) / 1000 > times[-1]:  # nothing since the slot before
            times.append((time - 1) / 1000)
            bits.append(bits[-1])
        times.append(time / 1000)
        bits.append(bits[-1] + count * SLOT_BITS)
    return Log(file.name, tuple(times), tuple(bits))


def _moving(where: str, what: str, log: Log) -> Log:
    """Refuses a log in which nothing passes; `where` names its lines, `what` the figure that is 0 in all of them."""
    if log.bits[-1] <= 0:
        raise UserError(
            f"{where}: {what} is always 0: not a bit passes in the whole log. A log must let something pass: leave it "
            "out, and say with network.availability or network.outages when there is no link"
        )
    return log


def _number(file: Path, line: int, word: str, what: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < MOST:
        raise UserError(f"{file}, line {line}: `{word}` where {what} belong: a number, 0 or above")
    return value


def _flash(file: Path, number: int, record: dict[str, Any]) -> StateTrace:
    name = str(record.get("guid", number))
    lines = record.get("messages")
    if isinstance(lines, str):
        lines = lines.splitlines()
    where = f"{file}, device {name}"
    if not isinstance(lines, list) or not lines:
        raise UserError(f"{where}: no `messages`, lines of `YYYY-mm-dd HH:MM:SS<TAB>state`")
    events = [_message(f"{where}, line {index}", line) for index, line in enumerate(lines, 1) if str(line).strip()]
    events.sort(key=lambda event: event[0])  # the logs are not always in order
    midnight = events[0][0] // DAY_S * DAY_S
    period_s = math.ceil((events[-1][0] - midnight + 1) / DAY_S) * DAY_S
    flags = {"connected": False, "wifi": False, "charging": False, "idle": True}
    began: dict[str, float] = {"idle": 0.0}
    windows: dict[str, list[tuple[float, float]]] = {flag: [] for flag in flags}
    for time, state in [*events, (midnight + period_s, None)]:
        now = {flag: False for flag in flags} if state is None else _apply(flags, state)
        for flag in flags:
            if now[flag] and not flags[flag]:
                began[flag] = time - midnight
            elif flags[flag] and not now[flag] and time - midnight > began[flag]:
                windows[flag].append((began[flag], time - midnight))
        flags = now
    return StateTrace(name, period_s, **{flag: tuple(found) for flag, found in windows.items()})


def _message(where: str, line: Any) -> tuple[float, str]:
    stamp, _, state = str(line).strip().partition("\t")
    try:
        time = datetime.strptime(stamp.strip(), "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise UserError(f"{where}: `{line}` must be `YYYY-mm-dd HH:MM:SS<TAB>state`") from None
    return (time - datetime(1970, 1, 1)).total_seconds(), state.strip().lower()


def _apply(flags: dict[str, bool], state: str) -> dict[str, bool]:
    """A battery level such as `85%` and states that say nothing of these flags change none."""
    now = dict(flags)
    if state in CONNECTED or state == "unknown":
        now["connected"], now["wifi"] = state in CONNECTED, state == "wifi"
    elif state in ("battery_charged_on", "battery_charged_off"):
        now["charging"] = state.endswith("on")
    elif state in ("screen_off", "screen_lock"):
        now["idle"] = True
    elif state == "screen_unlock":
        now["idle"] = False
    return now
