"""A deployed node: one device, with its user's data, its own settings and its own store, all in one folder.

`node.toml` holds the settings, `runs/` a store a run, in the form of a run directory. Nothing in it is shared with the
server: replies carry counts, scores and what the strategy shares.
"""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from untether.clients.hosting.store import DeviceStore
from untether.sim.core import strict_json
from untether.sim.core.clock import WallClock
from untether.sim.core.durable import write_private
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.records import Part
from untether.sim.experiment import Experiment
from untether.sim.experiment.deployed import NODES
from untether.sim.population.formats.nodes import told
from untether.sim.population.source import device_id, open_population
from untether.sim.rounds.messages import Order, Reply
from untether.sim.run.directory import RunDirectory
from untether.sim.run.tables import TABLES

OWN: Mapping[str, tuple[str, ...]] = {
    "population": ("source", "path", "split"),
    "cloud": ("base_url", "model", "api_key_env", "timeout_s", "max_retries", "concurrency"),
    "privacy": (),
    "engine": ("device", "threads", "memory_gib", "cache"),
}
"""What a node decides by itself, by section; where nothing is named, all of it."""

HIDDEN = ("input", "output", "prediction", "gold", "cluster", "query_time_s", "data_until_s")
"""Columns that the server gets empty: what a user wrote and when, and who is like whom."""

NAMES = ("query_id", "item_id")
"""Columns of names that a user's data brought: the server gets others, always the same ones."""


class Node:
    """The node in a folder. `device`: the number of its device, which is that of Flower's partition.

    Raises:
        UserError: The folder is none, or its settings do not hold.
    """

    def __init__(self, home: Path, device: int):
        self.home, self.device = home, device
        if not home.is_dir():
            raise UserError(f"{home}: no such folder. `home` of --node-config names the one with this node's data")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Node | None:
        """Returns the node that Flower's node config describes; None for a host of a simulation, which has no home."""
        home = config.get("home")
        return cls(Path(str(home)).expanduser().resolve(), int(config["partition-id"])) if home else None

    @cached_property
    def own(self) -> Mapping[str, Mapping[str, Any]]:
        """What `node.toml` sets; nothing where there is none."""
        path = self.home / "node.toml"
        try:
            found = strict_json.toml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{path}: not a TOML file: {error}") from None
        for section, values in found.items():
            if section not in OWN or not isinstance(values, Mapping):
                raise UserError(f"{path}: {unknown('section', section, OWN)}. A node sets these alone")
            for name in values:
                if OWN[section] and name not in OWN[section]:
                    raise UserError(f"{path}: [{section}] {unknown('field', name, OWN[section])}, of a node's own")
        return found

    @property
    def endpoint(self) -> Mapping[str, Any]:
        """What `node.toml` says of the cloud."""
        return self.own.get("cloud", {})

    def experiment(self, sent: Experiment) -> Experiment:
        """Returns the server's experiment as this node carries it out.

        A key is used for an endpoint that the node names itself and for no other, so that no server can have it sent
        elsewhere. Data of the node's own are of its device's user alone.
        """
        where, data = self.home / "node.toml", copy.deepcopy(sent.model_dump())
        data["cloud"] |= {"api_key_env": "", "cache": ""}  # a path of the server's machine is none of this one's
        data["engine"] |= {"cache": ""}
        if "base_url" in self.endpoint:
            data["cloud"]["provider"] = "openai"
        elif "api_key_env" in self.endpoint:
            raise UserError(f"{where}: [cloud] api_key_env without base_url: name the endpoint that the key is for")
        if "population" in self.own:
            data["population"] |= {"users": 1, "skip_users": 0, "shared_users": 0, "only": self.device}
        elif sent.population.source == NODES:
            raise UserError(f"{where}: no [population]. Say where this node's user's data are: source and path")
        for section, values in self.own.items():
            data[section] |= values
        path = Path(data["population"]["path"] or ".").expanduser()
        if "population" in self.own and not path.is_absolute():
            data["population"]["path"] = str(self.home / path)
        return Experiment.build(data, None, str(where))

    def told(self, sent: Experiment) -> dict[str, Any]:
        """Returns what the server may know of the user before the run."""
        experiment = self.experiment(sent)
        population = open_population(experiment, experiment.seeds[0])
        everybody = getattr(getattr(population, "data", None), "everybody", ())
        if len(everybody) > 1:
            raise UserError(
                f"{experiment.population.path}: data of {len(everybody)} users. A node has one user: give each a folder"
            )
        return told(population, self.device)

    def run(self, name: str, experiment: Experiment) -> RunDirectory:
        """Returns the store of a run, which is made where there is none."""
        if not re.fullmatch(r"[0-9a-f]{8,64}", name):
            raise UserError(f"the server's run is called {name!r}, which is no name of a run")
        path = self.home / "runs" / name
        if not (path / "experiment.toml").exists():
            return RunDirectory.create(path, experiment)
        run = RunDirectory.open(path)
        run.check_resumable(experiment)
        run.take_over(experiment)
        return run

    def kept_to_itself(self, error: Mapping[str, str]) -> dict[str, str]:
        """Returns an error as the server gets it. Its words, which may quote the user's data, stay in `errors.log`."""
        whole = "\n".join(filter(None, (WallClock().timestamp(), error["message"], error["traceback"])))
        with (self.home / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{whole}\n\n")
        return {**error, "message": f"node {self.device}: {error['error']}; errors.log in its folder says more",
                "traceback": ""}  # fmt: skip

    @cached_property
    def secret(self) -> bytes:
        """A secret of this node's, made once."""
        path = self.home / "secret"
        if not path.exists():
            write_private(path, secrets.token_bytes(32))
        return path.read_bytes()

    def keeper(self, run: RunDirectory, order: Order) -> NodeStore:
        """Opens the store of an order's run."""
        return NodeStore(run, order, self.secret)


class NodeStore(DeviceStore):
    """The store of a node: rows with texts stay in it, and replies carry what the server may have of them."""

    def __init__(self, run: RunDirectory, order: Order, secret: bytes):
        super().__init__(run, order)
        self._secret = secret

    def told(self, order: Order, reply: Reply) -> Reply:
        """Returns the reply with the rows of its parts, without texts and names."""
        paths = self.run.parts(order.seed, order.round, reply.parts)
        tables = {
            table: [self._public(row) for row in self.run.read_rows(found)]
            for table, found in paths.items() if table in TABLES
        }  # fmt: skip
        return replace(reply, tables=tables)

    def _public(self, row: Mapping[str, Any]) -> dict[str, Any]:
        hidden = {name: None for name in HIDDEN if name in row}
        names = {name: self._renamed(row[name]) for name in NAMES if row.get(name)}
        users = {"user_id": row["device_id"]} if "user_id" in row else {}
        return {**row, **hidden, **names, **users}

    def _renamed(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), key=self._secret, digest_size=6).hexdigest()

    def _rows(self, order: Order, table: str, parts: tuple[Part, ...], devices: set[int]) -> Any:
        """Those of this node: an order names the parts of all."""
        mine = {device_id(device) for device in devices}
        return super()._rows(order, table, tuple(part for part in parts if mine & set(part.name.split("-"))), devices)
