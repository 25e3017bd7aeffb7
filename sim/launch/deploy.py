"""A deployment on one machine, or what is needed for one on many: Flower's SuperLink and SuperNodes, with TLS.

`Deployment.write` lays out a folder; `Deployment.run` carries it out on loopback. The commands are the ones that
docs/deploy.md explains, so what runs here runs elsewhere with other addresses.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.durable import make_folder, write_atomically, write_private
from untether.sim.core.errors import Failure, ResumableStop, UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import ARMS, SHARED
from untether.sim.experiment.deployed import NODES

NAME, STARTED_S = "deployment", 90.0
LAST = 5
"""Lines of a run that an error repeats."""
PORTS = range(20_000, 32_000)
"""Below the ephemeral ports of every system: what takes seconds to listen finds its port still free."""
APP = """# The app that runs on server and nodes. Its code is the installed package `untether`.
[project]
name = "untether-deployment"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "untether"
fab-include = ["*.toml"]

[tool.flwr.app.components]
serverapp = "untether.server_app:app"
clientapp = "untether.client_app:app"

[tool.flwr.app.config]
experiment = ""
set = ""
out = ""
resume = ""
nodes = 0
"""


def deployable(experiment: Experiment, nodes: int) -> tuple[Experiment, list[str]]:
    """Returns an experiment for so many real devices, and the arms that had to be left out: those that need other
    users' data on a device.
    """
    left_out = [arm for arm in experiment.arms if ARMS[arm].draws == "foreign" or arm == SHARED]
    data = experiment.model_dump()
    data["population"]["users"] = nodes
    data["hardware"]["clock"] = "wall"
    data |= {"arms": [arm for arm in experiment.arms if arm not in left_out], "seeds": experiment.seeds[:1]}
    return Experiment.build(data, None, "the experiment"), left_out


@dataclass
class Deployment:
    """A folder with all that a deployment needs. `host`, `port`: where nodes reach the SuperLink (0: a free port)."""

    folder: Path
    experiment: Experiment
    host: str = "127.0.0.1"
    port: int = 0
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def nodes(self) -> range:
        return range(self.experiment.population.users)

    def home(self, node: int) -> Path:
        """Returns the folder of a node: its settings, its user's data, its store."""
        return self.folder / f"node-{node}"

    @property
    def run_directory(self) -> Path:
        """Where the server keeps the run."""
        return self.folder / "run"

    # --- what is written --------------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes certificates, the app, the experiment, a folder a node and the commands. What is there stays."""
        for folder in (self.folder / "app", self.folder / "flower", *map(self.home, self.nodes)):
            make_folder(folder)
        self.port = self.port or free_ports(1)[0]
        if not (self.folder / "certificates" / "ca.pem").exists():
            certify(self.folder / "certificates", self.host)
        write_atomically(self.folder / "app" / "pyproject.toml", APP)
        write_atomically(self.folder / "experiment.toml", self.experiment.to_toml())
        connection = {"address": f"{self.host}:{self.port}", "root-certificates": str(self._authority)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in connection.items()]
        write_atomically(
            self.folder / "flower" / "config.toml",
            "\n".join(["[superlink]", f'default = "{NAME}"', "", f"[superlink.{NAME}]", *lines, ""]),
        )
        for node in self.nodes:
            if not (self.home(node) / "node.toml").exists():
                write_atomically(self.home(node) / "node.toml", self._node_settings())
        ports = free_ports(len(self.nodes))
        told = [
            "# On the server.", shlex.join(self.superlink()), "",
            *(line for node in self.nodes for line in (f"# On node {node}.", shlex.join(self.node(node, ports[node])))),
            "", "# The run, from the server.",
            f"FLWR_HOME={shlex.quote(str(self.folder / 'flower'))} {shlex.join(self.flwr_run())}", "",
        ]  # fmt: skip
        write_atomically(self.folder / "commands.txt", "\n".join(told))

    def _node_settings(self) -> str:
        lines = ["# What this node decides by itself; see docs/deploy.md."]
        if self.experiment.population.source == NODES:
            lines += ["[population]", 'source = "jsonl"', 'path = "history.jsonl"  # of this node\'s user alone']
        lines += ["[engine]", f"threads = {max(1, limits.cores() // len(self.nodes))}  # of PyTorch", ""]
        lines += ["# [cloud]", '# base_url = "https://.../v1"', '# api_key_env = "MY_API_KEY"', ""]
        return "\n".join(lines)

    @property
    def _authority(self) -> Path:
        return (self.folder / "certificates" / "ca.pem").resolve()

    # --- the commands -----------------------------------------------------------------------------------------

    def superlink(self) -> list[str]:
        """Returns the command that starts the SuperLink."""
        made = self.folder.resolve() / "certificates"
        return [
            "flower-superlink", "--host", self.host, "--port", str(self.port),
            "--ssl-ca-certfile", str(made / "ca.pem"), "--ssl-certfile", str(made / "server.pem"),
            "--ssl-keyfile", str(made / "server.key"), "--disable-runtime-dependency-installation",
        ]  # fmt: skip

    def node(self, number: int, port: int) -> list[str]:
        """Returns the command that starts a node; `port`: a free one of its machine."""
        home = json.dumps(str(self.home(number).resolve()))
        config = f"partition-id={number} num-partitions={len(self.nodes)} home={home}"
        return [
            "flower-supernode", "--superlink", f"{self.host}:{self.port}", "--port", str(port),
            "--root-certificates", str(self._authority), "--node-config", config,
        ]  # fmt: skip

    def flwr_run(self) -> list[str]:
        """Returns the command that starts the run."""
        told: dict[str, object] = {"nodes": len(self.nodes)}
        if (self.run_directory / "experiment.toml").exists():
            told["resume"] = str(self.run_directory.resolve())
        else:
            told |= {"experiment": str((self.folder / "experiment.toml").resolve()), "out": str(self.run_directory)}
        config = " ".join(f"{name}={json.dumps(value)}" for name, value in told.items())
        return ["flwr", "run", str((self.folder / "app").resolve()), NAME, "--stream", "--run-config", config]

    # --- running it -------------------------------------------------------------------------------------------

    def run(self, say: Callable[[str], None], stop: threading.Event, again: str = "") -> None:
        """Starts SuperLink and nodes on this machine, carries out the run and ends them. `again`: what goes on.

        Raises:
            UserError, ResumableStop, Failure: As the run does; after a stop the same call goes on.
        """
        log = self.folder / "log.txt"
        with self.started(log):
            say(f"SuperLink on {self.host}:{self.port} (TLS), {len(self.nodes)} nodes; their log: {log}")
            self.carry_out(say, stop, log, again)

    @contextlib.contextmanager
    def started(self, log: Path) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
        """Has SuperLink and nodes run while the context is open; yields the processes of the nodes, by number."""
        try:
            self._start(self.superlink(), log)
            self._wait_for_port()
            ports = free_ports(len(self.nodes))
            yield {node: self._start(self.node(node, ports[node]), log) for node in self.nodes}
        finally:
            self.end()

    def carry_out(self, say: Callable[[str], None], stop: threading.Event, log: Path, again: str = "") -> None:
        """Starts the run on what is `started`, and waits for its end."""
        process = self._start(self.flwr_run(), None)
        assert process.stdout is not None
        threading.Thread(target=self._ended_by, args=(stop, process), daemon=True).start()
        said: list[str] = []
        for raw in process.stdout:
            line = _plain(raw.decode(errors="replace"))
            with log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            said = [*said[-40:], line]
            if told := re.search(r"waiting for \d+ nodes|run directory: .*|seed \d+, round .*", line):
                say(told[0])
        if stop.is_set():
            raise ResumableStop(f"interrupted\nGo on with the same command: {again}")
        if not (self.run_directory / "report.html").exists():
            last = "".join(f"\n    {line}" for line in said[-LAST:])
            raise _error(said) or Failure(
                f"the run ended without a report ({self._status()}); see {log}. What it said last:{last}"
            )

    def _status(self) -> str:
        """What became of the run for Flower, which knows it also where the run itself could not say it any more."""
        asked = self._start(["flwr", "list", NAME, "--limit", "1", "--format", "json"], None)
        told = asked.communicate()[0].decode(errors="replace")
        with contextlib.suppress(ValueError, LookupError):
            [run] = json.loads(told[told.index("{") :])["runs"]
            return f"Flower says {run['status']}: {run['status-details'] or 'no details'}"
        return "the SuperLink does not answer"

    def _ended_by(self, stop: threading.Event, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if stop.wait(0.2):
                self.end()

    def _start(self, words: Sequence[str], log: Path | None) -> subprocess.Popen[bytes]:
        home = self.folder / "flower"
        environment = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home.resolve()), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with contextlib.ExitStack() as files:
            sink = subprocess.PIPE if log is None else files.enter_context(log.open("ab"))
            process = subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._running.append(process)
        return process

    def _wait_for_port(self) -> None:
        clock = WallClock()
        end_s = clock.now_s() + STARTED_S
        while clock.now_s() < end_s and self._running[0].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), timeout=1.0):
                return
            clock.sleep(0.2)
        raise ResumableStop(f"the SuperLink did not start; see {self.folder / 'log.txt'}")

    def end(self) -> None:
        """Ends whatever was started, with all that it started."""
        for process in self._running:
            end(process)
        self._running.clear()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that came of it."""
    family = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()


def _error(said: Sequence[str]) -> Exception | None:
    """The error that the run's output ends in, if it tells one."""
    for line in reversed(said):
        if found := re.match(r"\S*\b(UserError|ResumableStop|Failure): (.*)", line):
            kind = {"UserError": UserError, "ResumableStop": ResumableStop, "Failure": Failure}[found[1]]
            return kind(found[2])
    return None


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody listens on, of those that no connection is given by chance."""
    found: set[int] = set()
    while len(found) < count:
        port = secrets.choice(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return list(found)


def certify(folder: Path, host: str) -> None:
    """Writes an authority (`ca.pem`) and a certificate of the server's that it signed (`server.pem`, `server.key`).

    Args:
        folder: Where to.
        host: The name or address under which nodes reach the server; `localhost` and 127.0.0.1 hold too.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    make_folder(folder)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"untether {what}")]) for what in ("CA", "server")]
    today = datetime.datetime.now(datetime.UTC)
    reached: list[x509.GeneralName] = []
    for name in dict.fromkeys([host, "localhost", "127.0.0.1"]):
        try:
            reached.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            reached.append(x509.DNSName(name))
    made = []
    for place, (key, name) in enumerate(zip(keys, names, strict=True)):
        builder = (
            x509.CertificateBuilder()
            .subject_name(name).issuer_name(names[0]).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - datetime.timedelta(hours=1))
            .not_valid_after(today + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=place == 0, path_length=None), critical=True)
        )  # fmt: skip
        if place:
            builder = builder.add_extension(x509.SubjectAlternativeName(reached), critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    secret = keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, content in (("ca.pem", made[0]), ("server.pem", made[1]), ("server.key", secret)):
        write_private(folder / name, content)
