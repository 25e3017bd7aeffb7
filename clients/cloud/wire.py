"""The HTTP under the asking: what a body may hold, where a request may go, and what the key may be shown to."""

from __future__ import annotations

import asyncio
import os
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

import httpx2
import openai

from untether.clients.cloud.answer import Unusable
from untether.sim.core.errors import UserError
from untether.sim.core.text import shown
from untether.sim.experiment.endpoint import is_loopback, without_credentials

BODY_BYTES = 64 * 1024
BYTES_A_TOKEN = 16
EVENT_BYTES_A_TOKEN = 512
"""A stream wraps each token into an event of its own."""

_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def http_client(url: str, max_tokens: int) -> httpx2.AsyncClient:
    """Returns a client for `openai.AsyncOpenAI` that reads at most so many bytes of a body and follows no redirect.

    Raises UserError where the environment's proxy or certificates cannot be used.
    """
    loopback = is_loopback(url)

    async def bound(response: httpx2.Response) -> None:
        encoding = response.headers.get("content-encoding", "identity").lower()
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        most = BODY_BYTES + max_tokens * (EVENT_BYTES_A_TOKEN if events else BYTES_A_TOKEN)
        if encoding in ("gzip", "x-gzip", "deflate"):
            del response.headers["content-encoding"]
        elif encoding != "identity":
            await response.aclose()
            raise Unusable(f"the body is compressed as {shown(encoding, 40)}, which was not asked for")
        response.stream = _Bounded(response.stream, most, encoding != "identity")

    try:
        # Reading them takes a tenth of a second, each time that a host asks; plain HTTP to this machine knows none.
        plain = loopback and url.startswith("http:")
        certificates = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else httpx2.create_ssl_context()
        return openai.DefaultAsyncHttpxClient(
            verify=certificates, trust_env=not loopback, follow_redirects=False, event_hooks={"response": [bound]},
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        raise UserError(_environment(error)) from error


class _Bounded(httpx2.AsyncByteStream):
    """`stream` up to `most` bytes, unpacked where it is compressed; Unusable beyond them."""

    def __init__(self, stream: httpx2.AsyncByteStream, most: int, compressed: bool) -> None:
        self._stream, self._most, self._compressed = stream, most, compressed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        unpack = zlib.decompressobj(wbits=47) if self._compressed else None
        left = self._most
        async for block in self._stream:
            try:
                block = unpack.decompress(block, left + 1) if unpack else block
            except zlib.error as error:
                raise Unusable(f"the body cannot be unpacked: {error}") from error
            left -= len(block)
            if left < 0:
                raise Unusable(f"the body is larger than {self._most} bytes, more than cloud.max_tokens can take")
            yield block

    async def aclose(self) -> None:
        await self._stream.aclose()


def _environment(error: Exception) -> str:
    """One sentence on a proxy or a file of certificates that the environment names and that cannot be used."""
    found = _set(_CERTIFICATES if isinstance(error, OSError) else _PROXIES)
    said = shown(str(error), 160)
    if isinstance(error, OSError):
        place = found or "SSL_CERT_FILE"
        return f"the environment's certificates cannot be read: {place} ({said}). Correct the variable or unset it"
    if isinstance(error, ImportError):
        return (
            f"the environment's proxy cannot be used: {found} is a SOCKS proxy, which needs a package that is not "
            "installed (`pip install 'httpx[socks]' socksio`). Install it, give an http:// proxy, or unset the variable"
        )
    return (
        f"the environment's proxy cannot be used: {found or said} is of a kind that is not known here. Give an http:// "
        "or socks5:// address, or unset the variable"
    )


def proxy_to(url: str) -> str:
    """Returns the variable, with its value, of the proxy that the environment puts before a URL; empty for none."""
    parts = urlsplit(url)
    if is_loopback(url) or proxy_bypass_environment(parts.netloc):
        return ""
    return _set((f"{parts.scheme}_PROXY".upper(), "ALL_PROXY"))


def _set(names: tuple[str, ...]) -> str:
    """The first of these variables that is set, with its value; a password in it is not shown."""
    for name in (*names, *(name.lower() for name in names)):
        if value := os.environ.get(name):
            return f"{name}={without_credentials(value)}"
    return ""


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns uvloop's, where there is one."""
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop
