"""What a client holds of the gateway without asking anything ends."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import uvicorn

from untether.server import connections
from untether.server.connections import BoundedProtocol
from untether.server.gateway import create_app, start_background
from untether.server.generator import create

ASKED = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@contextmanager
def served(app=None) -> Iterator[int]:
    """An app, the gateway's by default, over the gateway's protocol, in a thread; yields the port."""
    app = app or create_app(create("recombine"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, http=BoundedProtocol, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


@contextmanager
def client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as made:
        yield made


def ended(connection: socket.socket) -> bool:
    """Whether the server ends the connection, within the socket's ten seconds, and without a word."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def answered(connection: socket.socket) -> bool:
    connection.sendall(ASKED + b"\r\n")
    return connection.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", ASKED, b"POST /v1/models HTTP/1.1\r\nContent-Le"])
def test_half_a_head_ends(monkeypatch, sent):
    monkeypatch.setattr(connections, "IDLE_S", 0.3)
    with served() as port, client(port) as slow, client(port) as other:
        slow.sendall(sent)
        assert ended(slow)
        assert ended(other)  # it has asked nothing, too
        with client(port) as third:
            assert answered(third)
            third.sendall(sent or b"GET")  # the second head of a connection is bounded as the first
            assert ended(third)


def test_a_head_that_comes_in_drops_ends_as_one_that_stops(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_S", 0.5)
    with served() as port, client(port) as slow, pytest.raises(OSError):
        slow.sendall(ASKED)
        for _ in range(200):
            slow.sendall(b"a: b\r\n")
            time.sleep(0.05)


def test_a_head_without_end_ends():
    with start_background("recombine") as gateway:
        port = urlsplit(gateway.base_url).port
        with client(port) as endless, pytest.raises(OSError):
            endless.sendall(ASKED)
            for _ in range(1000):
                endless.sendall(b"a: " + b"b" * 4000 + b"\r\n")
        with client(port) as other:
            assert answered(other)


def test_a_connection_too_many_is_refused_and_those_that_ask_are_answered(monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with served() as port, client(port) as one, client(port) as two:
        assert answered(one) and answered(two)
        with client(port) as three:
            assert ended(three)
        assert answered(one) and answered(two)


def test_an_answer_may_take_longer_than_a_head(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_S", 0.2)

    async def slow(scope, receive, send) -> None:
        await asyncio.sleep(0.6)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    with served(slow) as port, client(port) as patient:
        assert answered(patient)
