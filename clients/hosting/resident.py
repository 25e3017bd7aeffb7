"""The worker of a deployed node: a process that keeps the models, since Flower starts a fresh one for every message.

The first message starts it, on loopback, with a key that only this user can read; it ends with the node, or when nobody
has asked anything of it for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil

from untether.clients.device.worker import Inputs, Outcome
from untether.clients.hosting.executors import WorkerDied, memory_ran_out
from untether.clients.hosting.process import Post, WorkerProcess
from untether.sim.core.clock import WallClock
from untether.sim.core.durable import write_private
from untether.sim.core.errors import Failure, ResumableStop, UserError
from untether.sim.core.package_data import import_root
from untether.sim.rounds.messages import Order
from untether.sim.rounds.work import Work
from untether.sim.run.directory import versions

STARTED_S, LOOK_S = 120.0, 1.0
IDLE_S = 1800.0
"""How long a resident whose node cannot be watched stays without work."""


class ResidentExecutor:
    """Runs calls in the resident process of a node's folder, which is started where there is none. See `Executor`."""

    def __init__(self, home: Path, post: Post):
        self.home, self.post = home, post

    def call(
        self, order: Order, inputs: Inputs, *, deadline_s: float, progress: Callable[[Work], None] = lambda work: None
    ) -> Outcome:
        """Has the resident carry out an order; without progress for `deadline_s` it is taken to hang."""
        found, connection = self._connected()
        clock = WallClock()
        seen: Work = {}
        since_s = clock.now_s()
        try:
            connection.send((self.post, order, inputs))
            while True:
                kind, said = connection.recv() if connection.poll(LOOK_S) else ("work", seen)
                if kind == "outcome":
                    return said
                if kind == "error":
                    raise said
                if said != seen:
                    seen, since_s = said, clock.now_s()
                    progress(said)
                elif clock.now_s() - since_s > deadline_s:
                    raise WorkerDied(f"no progress for {deadline_s:.0f} s (engine.deadline_s)", "timeout")
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the node's worker process ended ({type(error).__name__})") from error
        except WorkerDied:
            with contextlib.suppress(psutil.Error):
                psutil.Process(found["pid"]).kill()
            raise
        finally:
            connection.close()

    def _connected(self) -> tuple[dict[str, Any], Connection]:
        """The resident's address, and a connection to it."""
        clock = WallClock()
        end_s, process = clock.now_s() + STARTED_S, None
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, AuthenticationError):
                found = json.loads(_place(self.home).read_text(encoding="utf-8"))
                if found["versions"] == versions() and psutil.pid_exists(found["pid"]):
                    return found, Client(("127.0.0.1", found["port"]), authkey=bytes.fromhex(found["key"]))
            process = process or self._start()
            if process.poll() is not None:
                raise WorkerDied(f"the node's worker process did not start; see {self.home / 'resident.log'}")
            if clock.now_s() > end_s:
                raise WorkerDied(f"the node's worker process was not there within {STARTED_S:.0f} s", "timeout")
            clock.sleep(0.1)

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(import_root()), os.environ.get("PYTHONPATH", "")]))
        with (self.home / "resident.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.home), str(_node_process())], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip


def _place(home: Path) -> Path:
    """Where a resident says how to reach it."""
    return home / "resident.json"


def _node_process() -> int:
    """The process of the SuperNode that this ClientApp works for; 0 where none is among its parents."""
    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(Path(word).name == "flower-supernode" for word in parent.cmdline()[:3]):
                return parent.pid
    return 0


class _Resident:
    """The process itself. One order at a time."""

    def __init__(self, home: Path, node: int):
        self.home, self.node = home, node
        self.worker, self._since_s, self._works = WorkerProcess(), WallClock().now_s(), False

    def serve(self) -> None:
        """Answers calls until the node is gone."""
        key = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            said = {"port": listener.address[1], "pid": os.getpid(), "key": key.hex(), "versions": versions()}
            write_private(_place(self.home), json.dumps(said).encode())
            print(f"worker process {os.getpid()}", flush=True)
            threading.Thread(target=self._watch, daemon=True).start()
            while True:
                with contextlib.suppress(OSError, EOFError), listener.accept() as connection:
                    self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        post, order, inputs = connection.recv()
        done: list[tuple[str, Any]] = []
        self._works = True
        thread = threading.Thread(target=lambda: done.append(self._carried_out(post, order, inputs)))
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            if thread.is_alive():
                with contextlib.suppress(OSError):  # whoever asked is gone: the order ends all the same
                    connection.send(("work", self.worker.look()))
        self._works, self._since_s = False, WallClock().now_s()
        connection.send(done[0])

    def _carried_out(self, post: Post, order: Order, inputs: Inputs) -> tuple[str, Any]:
        try:
            return "outcome", self.worker.call(post, order, inputs)
        except (UserError, ResumableStop) as error:
            return "error", type(error)(str(error))
        except Exception as error:
            if memory_ran_out(error):
                return "error", WorkerDied(f"{type(error).__name__}: {error}", "out_of_memory")
            return "error", Failure(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

    def _watch(self) -> None:
        """Ends the process with its node."""
        clock = WallClock()
        while True:
            clock.sleep(2 * LOOK_S)
            idle = not self._works and clock.now_s() - self._since_s > IDLE_S
            if not self.home.is_dir() or (not psutil.pid_exists(self.node) if self.node else idle):
                with contextlib.suppress(OSError, ValueError):
                    if json.loads(_place(self.home).read_text(encoding="utf-8"))["pid"] == os.getpid():
                        _place(self.home).unlink()
                os._exit(0)


if __name__ == "__main__":
    _Resident(Path(sys.argv[1]), int(sys.argv[2])).serve()
