"""Flower's own strategies on the shared part of adapters: every device of a cohort is a node to them.

`strategy.aggregate` names one and `strategy.options` its keyword arguments; `strategy.privacy` wraps it into one of
Flower's for central differential privacy. What a strategy remembers (moments, a clipping norm) is kept with what is
shared, under `server/`, so that a resumed run goes on from it; what it draws comes from (seed, round).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from flwr.supercore.task_identity import TaskIdentity

from untether.sim.core.errors import UserError, unknown
from untether.sim.core.seeding import derive
from untether.sim.experiment.strategy_section import Strategy as StrategySection

DEVICE, SERVER = "device/", "server/"
"""Arrays of one device, `device/NUMBER/name`, and what a strategy remembers."""

AGGREGATES = (
    "FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedProx", "FedMedian", "FedTrimmedAvg", "Krum",
    "MultiKrum", "Bulyan",
)  # fmt: skip
"""Those that need nothing of a device but arrays and a number of examples."""

WRAPPERS = ("DifferentialPrivacyServerSideFixedClipping", "DifferentialPrivacyServerSideAdaptiveClipping")
"""Those that need no modifier in the client."""

_ONE_IS_ENOUGH = {"min_train_nodes": 1, "min_available_nodes": 1}
_OURS = ("fraction_train", "fraction_evaluate", "weighted_by_key", "arrayrecord_key", "configrecord_key")


class Stock:
    """One of Flower's strategies, as an experiment's `[strategy]` names it.

    Raises:
        UserError: There is no such strategy, or it refuses its options.
    """

    def __init__(self, section: StrategySection):
        self.section = section
        for kind, name, known in (
            ("aggregate", section.aggregate, AGGREGATES), ("privacy", section.privacy, ("", *WRAPPERS))
        ):  # fmt: skip
            if name not in known:
                raise UserError(f"strategy.{kind}: {unknown('strategy of Flower', name, [*filter(None, known)])}")
        for name in _OURS:
            if name in section.options:
                raise UserError(f"strategy.options.{name}: who takes part is for strategy.select and strategy.fraction")
        self._made(1)

    @property
    def mu(self) -> float:
        """The weight of FedProx's proximal term; 0 for the others."""
        made = self._made(1)
        return float(getattr(getattr(made, "strategy", made), "proximal_mu", 0.0))

    def after(
        self, seed: int, round: int, shared: Mapping[str, np.ndarray], sums: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Returns what is shared after a round, of the arrays of each device."""
        devices: dict[int, dict[str, np.ndarray]] = {}
        for name, array in sums.items():
            if name.startswith(DEVICE):
                number, _, own = name.removeprefix(DEVICE).partition("/")
                devices.setdefault(int(number), {})[own] = array
        if not devices:
            return dict(shared)
        made = self._made(len(devices))
        _restore(made, shared)
        first = next(iter(devices.values()))
        travels = [name for name in sorted(first) if name != "weight"]
        current = ArrayRecord({name: Array(np.asarray(shared[name])) for name in travels if name in shared})
        with _quiet(), _seeded(seed, round), _in_a_run():
            asked = made.configure_train(round + 1, current, ConfigRecord(), _Devices(devices))
            replies = [_reply(message, devices, travels) for message in _in_order(asked)]
            arrays, _ = made.aggregate_train(round + 1, replies)
        if arrays is None:
            return dict(shared)
        kept = {name: array for name, array in shared.items() if not name.startswith(SERVER)}
        return kept | {name: arrays[name].numpy() for name in travels} | _remembered(made)

    def _made(self, devices: int) -> FlowerStrategy:
        section = self.section
        try:
            made = getattr(flower, section.aggregate)(**_ONE_IS_ENOUGH, **section.options)
            if section.privacy:
                options = {"num_sampled_clients": devices, **section.privacy_options}
                made = getattr(flower, section.privacy)(made, **options)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"strategy.options = {section.options}, strategy.privacy_options = {section.privacy_options}: Flower's "
                f"{section.privacy or section.aggregate} says: {error}"
            ) from None
        return made


class _Devices:
    """A grid whose nodes are devices, for a strategy that samples from it. Node ids begin at 1."""

    def __init__(self, devices: Iterable[int]):
        self.ids = [device + 1 for device in sorted(devices)]

    def get_node_ids(self) -> list[int]:
        return list(self.ids)


def _in_order(messages: Iterable[Message]) -> list[Message]:
    """By device: Flower samples even where it takes all, and the order of a sum shows in its last digits."""
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def _reply(message: Message, devices: Mapping[int, Mapping[str, np.ndarray]], names: Iterable[str]) -> Message:
    own = devices[message.metadata.dst_node_id - 1]
    content = RecordDict({
        "arrays": ArrayRecord({name: Array(np.asarray(own[name])) for name in names}),
        "metrics": MetricRecord({"num-examples": float(own["weight"])}),
    })  # fmt: skip
    return Message(content, reply_to=message)


def _remembered(made: Any, place: str = SERVER) -> dict[str, np.ndarray]:
    """What a strategy, and one that it wraps, holds between rounds, as arrays."""
    found: dict[str, np.ndarray] = {}
    for name, value in vars(made).items():
        if isinstance(value, FlowerStrategy):
            found |= _remembered(value, f"{place}{name}/")
        elif isinstance(value, float):
            found[f"{place}{name}/float"] = np.array(value)
        elif isinstance(value, dict) and value and all(isinstance(one, np.ndarray) for one in value.values()):
            found |= {f"{place}{name}/dict/{key}": one for key, one in value.items()}
        elif isinstance(value, list) and value and all(isinstance(one, np.ndarray) for one in value):
            found |= {f"{place}{name}/list/{number:06d}": one for number, one in enumerate(value)}
    return found


def _restore(made: Any, shared: Mapping[str, np.ndarray], place: str = SERVER) -> None:
    for name, value in list(vars(made).items()):
        if isinstance(value, FlowerStrategy):
            _restore(value, shared, f"{place}{name}/")
            continue
        begin = f"{place}{name}/"
        found = {key.removeprefix(begin): array for key, array in shared.items() if key.startswith(begin)}
        if "float" in found:
            setattr(made, name, float(found["float"]))
        elif found and next(iter(found)).startswith("dict/"):
            setattr(made, name, {key.removeprefix("dict/"): array for key, array in found.items()})
        elif found:
            setattr(made, name, [found[key] for key in sorted(found)])


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _in_a_run() -> Iterator[None]:
    """Flower's messages can be made inside a run of Flower alone, which sets who makes them; so a run without Flower
    (in-process) says so for a moment.
    """
    unset = [name for name in ("_task_id", "_run_id", "_node_id") if getattr(TaskIdentity, name) is None]
    for name in unset:
        setattr(TaskIdentity, name, 0)
    try:
        yield
    finally:
        for name in unset:
            setattr(TaskIdentity, name, None)


@contextmanager
def _seeded(seed: int, round: int) -> Iterator[None]:
    """Flower draws from the global generators of Python and numpy."""
    kept = random.getstate(), np.random.get_state()
    random.seed(derive(seed, round, "strategy", "random"))
    np.random.seed(derive(seed, round, "strategy", "numpy") % 2**32)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
