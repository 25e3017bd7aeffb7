"""Bounds on what a client may hold of the gateway before it has asked anything."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

IDLE_S = 10.0
MAX_HEAD_BYTES = 64 * 2**10
MAX_CONNECTIONS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, which by itself waits for ever for the rest of a request's head, however long that grows.

    A connection is cut that has had no request to be answered for `IDLE_S`, or sent `MAX_HEAD_BYTES` of a head, or is
    one more than `MAX_CONNECTIONS`.
    """

    _waiting: asyncio.TimerHandle | None = None
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Takes a connection, if there is room for one."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        """Takes what has come; a head that is complete makes a request."""
        super().data_received(data)
        if self._is_answering:
            self._stop_waiting()
        elif self.cycle is None or not self.cycle.more_body:
            self._head += len(data)
            if self._head > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_response_complete(self) -> None:
        """Goes on to what was sent meanwhile, or waits for the next request."""
        super().on_response_complete()
        if not self._is_answering:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(IDLE_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._head = 0
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
