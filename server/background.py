"""A gateway in a process of its own, for the length of a run: started on a free loopback port, stopped with the run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from untether.sim.core.errors import UserError
from untether.sim.core.package_data import import_root

_ROOT = str(import_root())


@dataclass
class Gateway:
    """A running background gateway; a context manager. `base_url` ends in `/v1`; `model` is the name to request.

    `limit_s` is how long a request may take by the speed that the generator measured (0: it measured none).
    """

    base_url: str
    model: str
    fingerprint: str
    limit_s: float
    _process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        """The gateway's process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Returns whether the process still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process; harmless if it has already ended."""
        atexit.unregister(self.stop)
        if self.alive():
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()


def start_background(
    generator: str,
    options: Mapping[str, Any] | None = None,
    *,
    plugins: Sequence[str] = (),
    load: tuple[int, int] | None = None,
    api_key: str | None = None,
    start_timeout_s: float = 120.0,
) -> Gateway:
    """Serves a named generator from another process and waits until it answers.

    The process prints nothing here, ignores Ctrl-C in the terminal (its parent decides) and ends when its parent does.

    Args:
        generator: Its registered name.
        options: Its options, which must be JSON.
        plugins: Plug-ins that may have registered the name.
        load: Most tokens of an answer, and how many requests wait at once.
        api_key: The key that requests must carry, if any.
        start_timeout_s: How long it may take to answer.

    Raises:
        UserError: The generator refuses its name or options.
        RuntimeError: The process fails otherwise, or does not answer in time; the message has its last output.
    """
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("UNTETHER_GATEWAY_KEY", None)
    if api_key is not None:
        environment["UNTETHER_GATEWAY_KEY"] = api_key
    words = [*(["--load", *map(str, load), "--"] if load else []), generator]
    words += [json.dumps(dict(options or {})), str(os.getpid()), *plugins]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "untether.server.gateway", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + start_timeout_s
        try:
            ready = _announcement(process, deadline)
            if "error" in ready:
                raise UserError(ready["error"]) if ready.get("kind") == "user" else RuntimeError(_words(ready, errors))
            gateway = Gateway(
                f"http://127.0.0.1:{ready['port']}/v1", ready["model"], ready["fingerprint"],
                ready.get("limit_s", 0.0), process,
            )  # fmt: skip
            _wait_until_healthy(gateway, deadline)
        except BaseException:
            process.kill()
            process.wait()
            process.stdout.close()
            raise
    atexit.register(gateway.stop)
    return gateway


def _announcement(process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    """The first JSON line on the child's stdout (a library may have printed others before)."""
    pipe, text = process.stdout.fileno(), b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        chunk = os.read(pipe, 65536)
        text += chunk
        for line in text.split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
        if not chunk:
            return {"error": f"it ended with exit code {process.wait()} before it served"}
    return {"error": "it did not get ready in time"}


def _words(ready: Mapping[str, Any], errors: Any) -> str:
    errors.seek(0)
    last = errors.read()[-2000:].decode(errors="replace").strip()
    return f"the background gateway did not start: {ready['error']}" + (f"\n{last}" if last else "")


def _wait_until_healthy(gateway: Gateway, deadline: float) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    while True:
        try:
            with opener.open(gateway.base_url.removesuffix("/v1") + "/health", timeout=5):
                return
        except OSError as error:
            if not gateway.alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the background gateway does not answer: {error}") from error
            time.sleep(0.05)
