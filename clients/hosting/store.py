"""The devices' store: it keeps what is private to the devices, and gives passes what their orders name.

In a simulation it is the run directory, so that the rows of all hosts' devices become the run's tables.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

from untether.clients.device.materials import donors, needs_others
from untether.clients.device.worker import Inputs, Outcome
from untether.clients.stores.adapter_store import AdapterStore
from untether.sim.core.errors import UserError
from untether.sim.core.records import Part
from untether.sim.population.source import device_id
from untether.sim.rounds.messages import Learn, Order, Refilter, Reply, Update
from untether.sim.rounds.sharing import private_name, rank_of
from untether.sim.run.directory import RunDirectory


class DeviceStore:
    """The store of the devices of one order's seed, on a run directory."""

    def __init__(self, run: RunDirectory, order: Order):
        self.run, self.experiment = run, run.experiment
        self.adapters = AdapterStore(run.path, order.seed)
        if isinstance(order, Learn):
            self.adapters.prune(order.settled)

    def inputs(self, order: Order) -> Inputs:
        """Returns what the store holds for an order's devices (for the placebo: their donors too)."""
        mine = {*order.devices}
        if isinstance(order, Update):
            return Inputs(private=self._private(order))
        if isinstance(order, Refilter):
            return Inputs(self._rows(order, "samples", order.samples, mine))
        if not isinstance(order, Learn):
            return Inputs()
        if needs_others(self.experiment):
            lenders = {*mine, *(donor for lent in donors(order).values() for donor in lent)}
        else:
            lenders = mine
        adapters, starts = {}, {}
        for version in order.versions:
            name = device_id(version.device)
            if version.round < order.round:
                target, found = adapters, self.adapters.load_exactly(version.round, name, version.kept)
            elif self.experiment.for_arm(version.arm)[1].start in ("continue", "on_shared"):
                target, found = starts, self.adapters.load(order.round - 1, name, version.arm)
            else:
                continue
            if found is not None:
                target[version] = found
            elif version.round < order.round:
                raise UserError(
                    f"{self.adapters.root}: the adapter of device {name}, arm {version.arm}, trained in round "
                    f"{version.round}, is gone. Put the run's `adapters` back from a copy, or start the run anew"
                )
        return Inputs(
            self._rows(order, "samples", order.samples, lenders), self._rows(order, "answers", order.answers, mine),
            adapters, starts, self._private(order),
        )  # fmt: skip

    def _private(self, order: Learn | Update) -> dict[int, Any]:
        """What devices keep for themselves of what the strategy has them train."""
        found = {}
        for device, round in order.trained:
            name = device_id(device)
            kept = private_name(rank_of(self.experiment, order.seed, name))
            if (arrays := self.adapters.load_exactly(round, name, kept)) is not None:
                found[device] = arrays
        return found

    def keep(self, order: Order, outcome: Outcome) -> Reply:
        """Keeps the result of a pass and returns its reply, which names the parts. The same order again replaces it."""
        if outcome.adapters:
            self.adapters.save(order.round, order.name, outcome.adapters)
        for table, rows in outcome.tables.items():
            self.run.write_part(table, order.seed, order.round, order.name, rows)
        reply = replace(outcome.reply, parts={table: [order.name] for table in outcome.tables})
        if order.devices and not reply.arrays:  # those are not kept, so the shard is run again
            kept = {**_without_arrays(reply), "of": _digest(order)}
            self.run.write_receipt(order.seed, order.round, order.name, kept)
        return reply

    def kept(self, order: Order) -> Reply | None:
        """Returns the reply to an order that was carried out before, or None."""
        found = self.run.read_receipt(order.seed, order.round, order.name)
        if found is None or found.pop("of", "") != _digest(order):
            return None
        return Reply(**found)

    def told(self, order: Order, reply: Reply) -> Reply:
        """Returns a reply as the server gets it: it reads the rows of the parts where they are."""
        return reply

    def _rows(self, order: Order, table: str, parts: tuple[Part, ...], devices: set[int]) -> Any:
        paths = [path for part in parts for path in self.run.parts(order.seed, part.round, {table: [part.name]})[table]]
        return self.run.read_table(paths, [device_id(index) for index in sorted(devices)])


def _digest(order: Order) -> str:
    """What tells an order from another one of its name: its devices, and the rows that are for them."""
    own = [getattr(order, each.name) for each in fields(order) if each.metadata.get("rows") not in (None, Part)]
    return hashlib.blake2b(repr((order.devices, own)).encode(), digest_size=16).hexdigest()


def _without_arrays(reply: Reply) -> dict[str, Any]:
    return {each.name: getattr(reply, each.name) for each in fields(reply) if each.name != "arrays"}
