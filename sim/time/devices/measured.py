"""Published measurements of real devices, and what the cost model predicts for each. A row that cannot be predicted is
told, not dropped.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import median

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import MODELS
from untether.sim.experiment.sections import Lora
from untether.sim.time.cost import CostModel, ModelShape
from untether.sim.time.devices.backends import HEAD_BITS
from untether.sim.time.hardware import Profile, built_in

COLUMNS = (
    "device", "soc", "model", "params_b", "quantisation", "runtime", "setting", "metric", "value", "unit", "source",
    "date",
)  # fmt: skip
FIT, CHECK = "fit", "check"

BITS = {
    "q2_k": 2.63, "q3_k": 3.44, "q4_0": 4.5, "q4_1": 5.0, "q4_k": 4.85, "q5_0": 5.5, "q5_1": 6.0, "q5_k": 5.69,
    "q6_k": 6.56, "q8_0": 8.5, "iq4": 4.5,
}  # fmt: skip
"""Bits a weight of ggml's formats, scales and all (of the mixed ones, as whole files come out)."""

PROMPT, NEW = 256, 128
"""Tokens read and written where a row does not say."""


@dataclass(frozen=True)
class Measurement:
    """A published row. `part`: `fit` where figures of the model were fitted on it, else `check`."""

    device: str
    soc: str
    model: str
    params_b: float
    quantisation: str
    runtime: str
    setting: str
    metric: str
    value: float
    unit: str
    source: str
    date: str
    part: str = CHECK

    @cached_property
    def words(self) -> str:
        return f"{self.setting} {self.metric} {self.unit}".lower()

    def number(self, pattern: str, default: float | None = None) -> float | None:
        """Returns the number that the setting gives where `pattern` finds it."""
        found = re.search(pattern, self.setting.lower())
        if not found:
            return default
        text = found[1].replace(",", "")
        return 1e3 * float(text[:-1]) if text.endswith("k") else float(text)

    # --- what was measured, in the model's terms ----------------------------------------------------------------

    @cached_property
    def profile(self) -> Profile | None:
        """The catalogued device: of that name, or with that chip, on the processor that the runtime names."""
        known = built_in()
        scored = {key: _alike(profile, self.device, self.soc) for key, profile in known.items()}
        best = max(scored, key=lambda key: scored[key])
        return known[best].on(self._backend(known[best])) if scored[best] else None

    def _backend(self, profile: Profile) -> str:
        runtime = f"{self.runtime} {self.setting}".lower()
        for words, name in (
            (("hexagon", "npu", "qnn", "htp"), "npu"), (("cuda", "tensorrt"), "cuda"), (("metal", "mlx"), "metal"),
            (("opencl", "vulkan", "adreno", "mali"), "opencl"), (("cpu", "xnnpack", "neon"), "cpu"),
        ):  # fmt: skip
            if any(word in runtime for word in words):
                return name
        return profile.backend

    @cached_property
    def shape(self) -> ModelShape:
        """The model's sizes: of that name, or the nearest in weights, stretched to as many."""
        named = {_plain(name): MODELS.get(name) for name in MODELS}
        wanted = _plain(self.model)
        for name, shape in sorted(named.items(), key=lambda item: -len(item[0])):
            if wanted.startswith(name):
                return shape
        near = min(named.values(), key=lambda shape: abs(math.log(shape.parameters / (self.params_b * 1e9))))
        wider = (self.params_b * 1e9 / near.parameters) ** 0.5
        return replace(near, hidden=round(near.hidden * wider), intermediate=round(near.intermediate * wider))

    @cached_property
    def bits(self) -> float:
        """Bits a weight, scales and all."""
        text = _plain(self.quantisation, keep="_")
        for name, bits in BITS.items():
            if text.startswith(name):
                return bits
        if "16" in text:
            return 16.0
        if "32" in text:
            return 32.0
        found = re.search(r"\d+", text)
        bits = float(found[0]) if found else 8.0 if "gguf" in text else 16.0
        return bits + 0.5 if bits <= 8 else bits

    @cached_property
    def file_bytes(self) -> float:
        """Bytes of the weights: as the row says, else by the format (in ggml's, the head has more bits)."""
        said = self.number(r"([\d.]+) gb read")
        if said:
            return 1e9 * said
        head = max(self.bits, HEAD_BITS) if _plain(self.quantisation, keep="_").startswith("q") else self.bits
        shape = self.shape
        return ((shape.parameters - shape.head) * self.bits + shape.head * head) / 8

    @cached_property
    def cost(self) -> CostModel:
        """The cost model of this row."""
        assert self.profile is not None
        return CostModel(
            self.profile, self.shape, self.bits, self._lora(), checkpointing=self.checkpointing,
            file_bytes=self.file_bytes,
        )  # fmt: skip

    def _lora(self) -> Lora:
        rank = int(self.number(r"\br ?=? ?(\d+)", self.number(r"rank ?=? ?(\d+)", 8.0)) or 8)
        every = any(word in self.words for word in ("all-linear", "all linear", "all layers", "7 modules"))
        return Lora(rank=rank, target_modules=("all-linear",) if every else ("q_proj", "v_proj"))

    @property
    def checkpointing(self) -> bool:
        """Whether training kept the inputs of layers only: as the row says; phones' trainers do unless it says no."""
        if re.search(r"(no|without|not?) (gradient )?(re)?(checkpoint|comput)", self.words):
            return False
        phone = self.profile is not None and self.profile.kind == "phone"
        return phone or "checkpoint" in self.words

    @property
    def trains(self) -> bool:
        """Whether it is about training."""
        return any(word in self.words for word in ("train", "lora", "checkpoint", "iteration", "epoch", "fine-tun"))

    @property
    def prompt(self) -> int:
        said = self.number(r"(?:prompt|prefill|pp|context) ?=?~? ?([\d,]+k?)\b", self.number(r"\bpp([\d]+)"))
        return int(said or PROMPT)

    @property
    def tokens(self) -> int:
        """Tokens of a training row."""
        said = self.number(r"([\d,]+k?) tokens", self.number(r"seq(?:uence)?(?: length)? ?=? ?(\d+)"))
        return int(said or 512) if (said or 0) <= 16_384 else 512

    @property
    def total_tokens(self) -> float:
        """Tokens of a whole training."""
        said = self.number(r"([\d,]+k?) tokens")
        iterations = self.number(r"([\d,]+) iterations", 1.0) or 1.0
        return said if said and said > 16_384 else iterations * self.tokens

    @property
    def loaded_s(self) -> float:
        """Seconds of load before it was measured."""
        minutes = self.number(r"after ([\d.]+) min")
        return 60 * minutes if minutes else self.number(r"after ([\d.]+) s", 0.0) or 0.0

    # --- what the model says --------------------------------------------------------------------------------------

    def predicted(self) -> float | None:
        """Returns what the cost model says, in the row's unit. None: no catalogued device, or no such quantity in the
        model.
        """
        if self.profile is None:
            return None
        made = {
            "decode": self._decode, "prefill": self._prefill, "train": self._train, "memory": self._memory,
            "energy": self._energy, "power": self._energy, "efficiency": self._energy, "battery": self._energy,
            "cooling": self._cooling, "ttft": self._prefill,
        }.get(self.metric.lower())  # fmt: skip
        return made() if made else None

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        predicted = self.predicted()
        return predicted / self.value if predicted is not None and self.value else None

    def _decode(self) -> float | None:
        seen = self.prompt + NEW / 2 if re.search(r"prompt|context", self.words) else PROMPT
        seconds = self.cost.token_s(seen) / self.cost.profile.heat().after(self.loaded_s).speed
        return _rate(seconds, self.unit)

    def _prefill(self) -> float | None:
        seconds = self.cost.prefill_s(self.prompt) / self.cost.profile.heat().after(self.loaded_s).speed
        return _rate(seconds / self.prompt, self.unit) if "tok" in self.unit else _time(seconds, self.unit)

    def _train(self) -> float | None:
        if self.unit in ("h", "min") or "iterations" in self.setting or "epochs" in self.setting:
            return _time(self._whole_s(), self.unit)
        batch = self.number(r"batch ?=? ?(\d+)", 1.0) or 1.0
        seconds = self.cost.training_s(batch * self.tokens, batch * self.tokens, self.tokens)
        if "tok" in self.unit:
            return _rate(seconds / (batch * self.tokens), self.unit)
        return _time(seconds, self.unit.partition("/")[0])

    def _cool_s(self) -> float:
        """Seconds of the whole training on a device that stays cool; every position carries loss, as usual."""
        iterations = self.number(r"([\d,]+) iterations")
        row = self.total_tokens / iterations if iterations else float(self.tokens)
        return self.cost.training_s(self.total_tokens, self.total_tokens, row)

    def _whole_s(self) -> float:
        return self.cost.profile.heat().time_for(self._cool_s())

    def _memory(self) -> float | None:
        cost = self.cost
        used = cost.training_bytes(self.tokens, self.tokens) if self.trains else cost.decoding_bytes(self.prompt)
        scale = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "mib": 2**20, "gib": 2**30}.get(self.unit.lower())
        return used / scale if scale else None

    def _energy(self) -> float | None:
        profile, unit = self.cost.profile, self.unit.lower().replace(" ", "")
        if unit in ("w", "mw"):
            power = profile.work_w if "above idle" in self.words else profile.load_w
            power = profile.idle_w if re.search(r"\bidle\b", self.words) and "above" not in self.words else power
            return power * (1000 if unit == "mw" else 1)
        if "/" in unit:
            seconds = self.cost.token_s(PROMPT)
            seconds = self.cost.prefill_s(self.prompt) / self.prompt if "prefill" in self.words else seconds
            seconds = self.cost.training_s(self.tokens, self.tokens, self.tokens) if "iter" in unit else seconds
            energy_j = self.cost.energy_j(seconds)
            upside = unit.startswith("tok")
            unit = unit.partition("/")[2 if upside else 0]
            unit = "j" if unit == "joule" else unit
            scaled = _joules(energy_j, unit, profile)
            return None if scaled is None else 1 / scaled if upside else scaled
        return _joules(self.cost.energy_j(self._cool_s()), unit, profile)

    def _cooling(self) -> float | None:
        heat = self.cost.profile.heat().after(self.loaded_s or 600.0)
        return _time(heat.recovery_s(), self.unit)


def _plain(text: str, keep: str = "") -> str:
    return re.sub(rf"[^a-z0-9{keep}]", "", text.lower())


_NICKNAMES = {
    "poco-f8-ultra": ("myron", "sm8850"), "galaxy-s25-ultra": ("sm8750",), "galaxy-s24-ultra": ("sm8650",),
    "raspberry-pi-5": ("bcm2712",), "raspberry-pi-4": ("bcm2711",),
}  # fmt: skip
"""Codes by which chips and phones go in logs."""


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _alike(profile: Profile, device: str, soc: str) -> int:
    """How surely a row's device is this one: by name or, less so, by chip (the longer the surer); 0: not at all."""
    name, said = _tokens(profile.name), _tokens(device)
    if name <= said:
        return 10 + len(name)
    if any(nick in _tokens(f"{device} {soc}") for nick in _NICKNAMES.get(profile.name, ())):
        return 9
    chip = _tokens(profile.title.partition("(")[2].partition(",")[0])
    named = bool(chip) and "gb" not in chip and (chip <= _tokens(soc) or (len(chip) > 1 and chip <= said))
    return len(chip) if named else 0  # the longest name: `Snapdragon 8 Elite` is in that of its successor


def _rate(token_s: float, unit: str) -> float | None:
    unit = unit.lower()
    if unit.startswith(("tok", "t/s")):
        return 1 / token_s
    return _time(token_s, unit.partition("/")[0])


def _time(seconds: float, unit: str) -> float | None:
    scale = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}.get(unit.lower())
    return None if scale is None else seconds / scale


def _joules(energy_j: float, unit: str, profile: Profile) -> float | None:
    scale = {"j": 1.0, "mj": 1e-3, "wh": 3600.0, "mwh": 3.6, "kj": 1e3}.get(unit)
    if unit.startswith("%") and profile.battery_wh:
        scale = profile.battery_wh * 36.0
    return None if scale is None else energy_j / scale


def read_measurements(path: str | Path = "") -> list[Measurement]:
    """Returns the rows of a CSV (columns `COLUMNS`, perhaps `part`); without a path, those that come with the project.
    Raises UserError naming file, line and column.
    """
    where = str(path) or "sim/time/devices/measurements.csv"
    try:
        text = Path(path).read_text(encoding="utf-8") if path else (
            files(__package__).joinpath("measurements.csv").read_text(encoding="utf-8")
        )  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {error}. Give a CSV with the columns {', '.join(COLUMNS)}") from None
    found = []
    for line, row in enumerate(csv.DictReader(text.splitlines()), 2):
        for column in COLUMNS:
            if row.get(column) is None:
                need = ", ".join(COLUMNS)
                raise UserError(f"{where}, line {line}: the column `{column}` is missing. A row has {need}")
        values: dict[str, str | float] = {column: row[column].strip() for column in COLUMNS}
        for column in ("params_b", "value"):
            try:
                values[column] = float(row[column])
            except ValueError:
                raise UserError(f"{where}, line {line}: {column} = {row[column]!r}: it must be a number") from None
        found.append(Measurement(**values, part=row.get("part") or CHECK))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class Spread:
    """How far predictions are from measurements: `error` is the median factor (1: none), `spread` the geometric
    standard deviation around 1, `within` the share of rows within a factor of 1.6. A row without a prediction is
    infinitely far.
    """

    rows: int
    error: float
    spread: float
    within: float


WITHIN = 1.6


def spread(rows: Iterable[Measurement]) -> Spread:
    """Returns the spread of some rows."""
    ratios = [row.ratio for row in rows]
    logs = [abs(math.log(ratio)) if ratio else math.inf for ratio in ratios]
    if not logs:
        return Spread(0, math.nan, math.nan, math.nan)
    root = math.sqrt(sum(log * log for log in logs) / len(logs))
    near = sum(log <= math.log(WITHIN) for log in logs) / len(logs)
    return Spread(len(logs), math.exp(median(logs)), math.exp(root), near)


def by_metric(rows: Sequence[Measurement]) -> Mapping[str, Spread]:
    """Returns the spread of each metric, and of all."""
    metrics = dict.fromkeys(row.metric for row in rows)
    return {**{metric: spread(row for row in rows if row.metric == metric) for metric in metrics}, "all": spread(rows)}
