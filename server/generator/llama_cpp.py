"""A quantised model behind llama.cpp's own server, kept alive: started on loopback, started once more if it dies.

llama.cpp writes JSON by grammar, and answers several requests together in its slots. What a request shows beyond the
context is left out here, oldest items first, and the completion says so; llama.cpp itself would refuse the request.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from untether.server.generator import Completion, GenerationRequest, PromptTooLong, system_fingerprint
from untether.sim.core import limits
from untether.sim.core.clock import WallClock
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.package_data import import_root
from untether.sim.experiment.models.catalogue import catalogue, gguf_in
from untether.sim.experiment.models.fetch import sha256_of
from untether.sim.prompts.shrinking import shrunk

CONTEXT = 4096
"""Tokens of a request and its answer, unless an experiment says otherwise."""

SLOTS = 2
"""Requests that are answered together, unless an experiment says otherwise."""

_ROOT = str(import_root())

_START_S = 300.0
_STEADY_S = 4.0
"""A request may take so many times what its tokens took when the speed was measured: other work comes and goes."""


class ServerDied(RuntimeError):
    """llama.cpp's server ended, and was started again once already."""


def model_file(model: str) -> Path:
    """Returns the GGUF file of `cloud.model`: a fetched model of the catalogue, or a path. Raises UserError, saying the
    fix.
    """
    if found := catalogue().get(model):
        if not found.gguf.exists():
            raise UserError(
                f"cloud.model = `{model}` is not on this machine. Fetch it with: untether model fetch {model}"
            )
        return found.gguf
    gguf = gguf_in(Path(model).expanduser())
    if gguf is None or not gguf.is_file():
        hint = unknown("model", model, catalogue())
        raise UserError(f"cloud.model = `{model}` is no GGUF file, nor a folder with one, and an {hint}")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"cloud.model = `{model}`: {gguf} is no GGUF file: it begins with {magic!r}, not b'GGUF'")
    return gguf


def check_installed() -> None:
    """Raises UserError where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            'provider = "llama_cpp" needs the package xllamacpp: pip install \'untether[llama]\' (a prebuilt llama.cpp)'
        )


class LlamaCppGenerator:
    """A GGUF model by name of the catalogue or by path.

    `context`: tokens of a request and its answer; `slots`: requests answered together; `threads`: of llama.cpp. 0 is
    the default of each: `CONTEXT`, `SLOTS`, and half of the cores that are ours. `template_args` are what the model's
    chat template is given. Raises UserError where the file is none or llama.cpp is not installed or refuses it.

    The same request is answered alike but for rounding, which depends on what shares its batch.
    """

    name = "llama_cpp"
    batched = False
    structured = True

    def __init__(
        self, model: str, *, context: int = 0, slots: int = 0, threads: int = 0,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_installed()
        file = model_file(model)
        self.slots = slots or SLOTS
        self.context = context or CONTEXT
        self.model_id = model if model in catalogue() else file.stem
        self._told = {"enable_thinking": False, **(template_args or {})}
        self._options = {
            "model": str(file), "context": self.context, "slots": self.slots,
            "threads": threads or max(1, limits.cores() // 2),
        }  # fmt: skip
        version = importlib.metadata.version("xllamacpp")
        self.fingerprint = system_fingerprint("llama_cpp", 1, sha256_of(file), version, self._told, self.context)
        self._lock = threading.Lock()
        self._restarted = False
        self._log = tempfile.TemporaryFile()
        self._process, self._address = self._start()
        self.speed = self._measured()

    @property
    def pid(self) -> int:
        """The process of llama.cpp's server."""
        return self._process.pid

    def limit_s(self, max_tokens: int, waiting: int) -> float:
        """Returns how long a request may take, by the measured speed, where so many wait for the slots at once."""
        reading, writing = self.speed
        answer = min(max_tokens, self.context // 2)
        one_s = (self.context - answer) / reading + answer / writing
        return _STEADY_S * one_s * max(1.0, waiting / self.slots)

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """As `Generator.generate`; may be called by several threads at once, one a slot."""
        return [self._one(request) for request in batch]

    def close(self) -> None:
        """Ends the server."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _one(self, request: GenerationRequest) -> Completion:
        messages, note = self._fitting(request)
        body: dict[str, Any] = {
            "messages": messages, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0, "min_p": 0.0,
            "seed": request.seed & 0x7FFFFFFF, "max_tokens": request.max_tokens, "chat_template_kwargs": self._told,
        }  # fmt: skip
        if request.schema is not None:
            wanted = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        done = self._post("/v1/chat/completions", body)
        choice, usage = done["choices"][0], done["usage"]
        return Completion(
            choice["message"].get("content") or "", usage["prompt_tokens"], usage["completion_tokens"],
            "length" if choice.get("finish_reason") == "length" else "stop", note=note,
        )  # fmt: skip

    def _fitting(self, request: GenerationRequest) -> tuple[list[dict[str, Any]], str]:
        """The messages, with as many of the user's items as fit beside the answer, and what is missing."""
        room = self.context - min(request.max_tokens, self.context // 2)
        messages, left_out = list(request.messages), 0
        while (size := self._size(messages)) > room:
            fewer = shrunk(messages, room / size)
            if fewer is None:
                if size < self.context:
                    break  # nothing is left to leave out: the answer gets what there is
                raise PromptTooLong(f"this model's maximum context length is {self.context} tokens, not {size}")
            messages, items = fewer
            left_out += items
        return messages, f"context={self.context} items_left_out_or_cut={left_out}" if left_out else ""

    def _size(self, messages: Sequence[Mapping[str, Any]]) -> int:
        written = self._post("/apply-template", {"messages": messages, "chat_template_kwargs": self._told})["prompt"]
        return len(self._post("/tokenize", {"content": written, "parse_special": True})["tokens"])

    def _measured(self) -> tuple[float, float]:
        """Tokens read and tokens written a second, of one short request."""
        text = "The mayor said on Tuesday that the new bridge opens in May. " * 6
        body = {"prompt": text, "n_predict": 8, "temperature": 0, "cache_prompt": False}
        times = self._post("/completion", body)["timings"]
        return max(times["prompt_per_second"], 0.01), max(times["predicted_per_second"], 0.01)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of the server; where it died, of the one that is started in its place."""
        while True:
            process, address = self._process, self._address
            try:
                return _call(address + path, body)
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")
                if "exceed_context" in said:
                    raise PromptTooLong(f"this model's maximum context length is {self.context} tokens") from error
                raise RuntimeError(f"llama.cpp answers HTTP {error.code}: {said[:300]}") from error
            except (OSError, ValueError) as error:
                self._revive(process, error)

    def _revive(self, process: subprocess.Popen[bytes], error: Exception) -> None:
        with self._lock:
            if self._process is not process:
                return  # another thread has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)  # its socket closes before its end is seen
            how = f"exit code {process.returncode}" if process.poll() is not None else str(error)
            if self._restarted:
                words = _last_words(self._log)
                raise ServerDied(f"llama.cpp's server ended a second time ({how}); last words: {words}")
            self._restarted = True
            process.kill()
            process.wait()
            self._process, self._address = self._start()

    def _start(self) -> tuple[subprocess.Popen[bytes], str]:
        words = [json.dumps(self._options), str(os.getpid())]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "untether.server.generator.llama_process", *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))},
        )  # fmt: skip
        ready = _first_line(process, WallClock().now_s() + _START_S)
        if "address" not in ready:
            process.kill()
            process.wait()
            raise UserError(
                f"cloud.model: llama.cpp does not serve {self._options['model']} "
                f"({ready.get('error', 'it ended')}); its last words: {_last_words(self._log)}"
            )
        return process, ready["address"]


def _call(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    with opener.open(asked) as answer:
        return json.load(answer)


def _first_line(process: subprocess.Popen[bytes], deadline_s: float) -> dict[str, Any]:
    """What the process announces; empty where it ends or takes too long."""
    pipe: IO[bytes] = process.stdout  # type: ignore[assignment]
    clock = WallClock()
    while (left := deadline_s - clock.now_s()) > 0:
        if select.select([pipe], [], [], left)[0]:
            line = pipe.readline()
            return json.loads(line) if line else {}
    return {"error": f"not ready within {_START_S:.0f} s"}


def _last_words(log: IO[bytes]) -> str:
    log.seek(0, 2)
    log.seek(max(0, log.tell() - 2000))
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "none"
