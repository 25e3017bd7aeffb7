"""An endpoint on loopback that answers as a test tells it to, and a client that asks it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from untether.clients.cloud.client import CloudClient
from untether.clients.device.augmentation import samples_requests
from untether.sim.core.records import Interaction
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import format_samples

KEY = "UNTETHER_TEST_KEY"


@dataclass(frozen=True)
class Settings:
    base_url: str = ""
    model: str = "m"
    api_key_env: str = KEY
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 256
    structured: bool = True
    timeout_s: float = 5.0
    max_retries: int = 2
    concurrency: int = 4
    cache: str = ""


def completion(text: str | None, finish: str = "stop", refusal: str | None = None, usage: bool = True) -> dict:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m-2026",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }
    return {**body, "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}} if usage else body


PAIRS = format_samples([("in one", "out one"), ("in two", "out two")])
Handler = BaseHTTPRequestHandler


def send(handler: Handler, status: int, body: object, kind: str = "application/json", **headers: str) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def good(handler: Handler) -> None:
    send(handler, 200, completion(PAIRS))


def says(text: str | None, **more) -> Callable[[Handler], None]:
    return lambda handler: send(handler, 200, completion(text, **more))


def fails(status: int, message: str = "no", code: str | None = None, param: str | None = None, **headers: str):
    error = {"error": {"message": message, "type": "x", "code": code, "param": param}}
    return lambda handler: send(handler, status, error, **headers)


def html(handler: Handler) -> None:
    send(handler, 200, "<html><body>login</body></html>", "text/html")


def hang(handler: Handler) -> None:
    handler.server.released.wait(10)


def drip(handler: Handler) -> None:
    """Keeps the socket busy for ever: no read ever times out, only the request as a whole can."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b" ")


def cut_mid_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


class Cloud:
    """A server that plays a script: one behaviour a request, the last one for ever."""

    def __init__(self) -> None:
        outer = self
        self.script: list[Callable[[Handler], None]] = [good]
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        lock = threading.Lock()

        class Served(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append({k.lower(): v for k, v in self.headers.items()})
                    outer.times.append(time.monotonic())
                try:
                    outer.script[min(number, len(outer.script) - 1)](self)
                except OSError:
                    pass
                self.close_connection = self.close_connection or outer.script[-1] in (hang, drip)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
        self.server.daemon_threads = True
        self.server.released = threading.Event()
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.released.set()
        self.server.shutdown()
        self.server.server_close()


def orders(number: int = 1, count: int = 2, seed: int = 0, round: int = 0, items: int = 2):
    task = get_task("LaMP_4")
    history = [Interaction(f"i{i}", "LaMP_4", f"article {i}", f"headline {i}") for i in range(items)]
    return [
        request
        for device in range(number)
        for request in samples_requests(
            task, history, count, request_id=f"r{device}", device_id=f"d{device}", seed=seed, round=round
        )
    ]


def client(cloud: Cloud, wall: bool = False, max_wait_s: float = 120.0, **settings) -> CloudClient:
    config = replace(Settings(base_url=cloud.base_url), **settings)
    return CloudClient(config, wall=wall, backoff_s=0.01, max_wait_s=max_wait_s)


def outcomes(reply) -> list[str]:
    return [attempt.outcome for attempt in reply.attempts]
