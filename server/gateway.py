"""An OpenAI-compatible endpoint for any generator, so that devices reach every kind of cloud over HTTP.

`serve` blocks (`untether cloud serve`); `start_background` serves from a process of its own on a free loopback port, so
that the caller's event loop and this one do not share a core's GIL, and ends with its parent, however that one dies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from untether.server.background import Gateway, start_background
from untether.server.batching import Batcher
from untether.server.connections import BoundedProtocol
from untether.server.generator import Completion, GenerationRequest, Generator, NotRecorded, PromptTooLong, create
from untether.sim.core import strict_json
from untether.sim.core.errors import UserError
from untether.sim.core.text import shown
from untether.sim.experiment.plugins import load_plugins
from untether.sim.prompts.protocol import NotARequest

__all__ = ["ApiError", "Gateway", "create_app", "serve", "start_background"]


MAX_BODY_BYTES, BODY_S = 4 * 2**20, 30.0
MAX_TOKENS = 131_072
"""What one request may hold, how long it may take to send it, and how much it may ask for."""


class ApiError(Exception):
    """An error in the form of OpenAI's API."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str = "", param: str = ""):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param or None, "code": code or None}}


def create_app(generator: Generator, api_key: str | None = None, max_wait_s: float = 0.01) -> FastAPI:
    """Returns the endpoint: `POST /v1/chat/completions`, `GET /v1/models`, `GET /health`.

    Args:
        generator: Writes the answers.
        api_key: The key that requests must carry, if any.
        max_wait_s: A batched generator gets the requests of this long after the first waiting one in one call.
    """
    batcher = Batcher(generator, max_wait_s) if generator.batched else None
    threads = ThreadPoolExecutor(max(1, getattr(generator, "slots", 1)), thread_name_prefix="generator")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if batcher is not None:
            await batcher.close()
        threads.shutdown(wait=False, cancel_futures=True)
        getattr(generator, "close", lambda: None)()

    app = FastAPI(title="untether cloud", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            _authorize(request, api_key)
            wanted = _read(await _body(request), generator)
            if batcher is not None:
                done = await batcher.submit(wanted)
            else:  # off the event loop: a long answer keeps nobody else waiting for theirs to be read
                loop = asyncio.get_running_loop()
                done = (await loop.run_in_executor(threads, generator.generate, [wanted]))[0]
        except ApiError as error:
            return _json(error.body, error.status)
        except PromptTooLong as error:
            return _json(ApiError(400, str(error), code="context_length_exceeded", param="messages").body, 400)
        except NotRecorded as error:
            return _json(ApiError(400, str(error), code="not_recorded").body, 400)
        except NotARequest as error:
            return _json(ApiError(400, f"{generator.model_id} answers untether's own requests only: {error}").body, 400)
        except Exception as error:  # the endpoint must outlive a request that its generator fails on
            return _json(ApiError(500, f"{type(error).__name__}: {error}", "server_error").body, 500)
        return _json(_completion(generator, done))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            _authorize(request, api_key)
        except ApiError as error:
            return _json(error.body, error.status)
        entry = {"id": generator.model_id, "object": "model", "created": 0, "owned_by": "untether"}
        return _json({"object": "list", "data": [entry]})

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "model": generator.model_id, "fingerprint": generator.fingerprint})

    return app


def serve(
    generator: Generator | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    options: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serves until interrupted.

    Args:
        generator: A generator or a registered name.
        host: The address to listen on.
        port: 0 takes a free one.
        options: Those of a named generator.
        api_key: The key that requests must carry, if any.
        announce: Called with one line, the base URL and the model, once the port is open.

    Raises:
        UserError: The port is taken.
    """
    if isinstance(generator, str):
        generator = create(generator, options)
    with _bind(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        announce(f"serving {generator.model_id} at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C stops)")
        _server(generator, api_key).run(sockets=[listening])


def _server(generator: Generator, api_key: str | None) -> uvicorn.Server:
    app = create_app(generator, api_key)
    config = uvicorn.Config(
        app, http=BoundedProtocol, ws="none", log_level="error", access_log=False, timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot serve on {host}:{port}: {error.strerror or error}. Choose another --port, or 0 for any free one"
        ) from error
    return listening


def _authorize(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")


async def _body(request: Request) -> bytes:
    """A request's body, up to `MAX_BODY_BYTES` and within `BODY_S`. Raises ApiError beyond either."""
    blocks, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for block in request.stream():
                size += len(block)
                if size > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
                blocks.append(block)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_S:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the body was cut") from None
    return b"".join(blocks)


def _read(body: bytes, generator: Generator) -> GenerationRequest:
    """The request in a body, or an ApiError that names the field."""
    try:
        asked = strict_json.loads(body, max_depth=50)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(asked, dict):
        raise ApiError(400, "the body must be a JSON object")
    model = asked.get("model")
    if model != generator.model_id:
        named = shown(str(model), 100)
        message = f"The model `{named}` does not exist: this endpoint serves `{generator.model_id}`."
        raise ApiError(404, message, code="model_not_found", param="model")
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ApiError(400, "messages must be a non-empty list of objects", param="messages")
    for message in messages:
        if not isinstance(message.get("content"), (str, list, type(None))) or not isinstance(message.get("role"), str):
            raise ApiError(400, "each message needs a role, and a content that is text or parts", param="messages")
    if asked.get("stream"):
        raise ApiError(400, "streaming is not supported: leave stream out or set it to false", param="stream")
    if asked.get("n") not in (None, 1):
        raise ApiError(400, "n must be 1", param="n")
    wants = asked.get("response_format") or {}
    if isinstance(wants, dict) and wants.get("type", "text") != "text" and not generator.structured:
        message = f"{generator.model_id} does not support response_format {shown(str(wants['type']), 40)!r}"
        raise ApiError(400, message, param="response_format")
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    return GenerationRequest(
        tuple(messages),
        int(_number(asked, "seed", secrets.randbits(31), -(2**63), 2**63 - 1)),
        _number(asked, "temperature", 1.0, 0, 2),
        _number(asked, "top_p", 1.0, 0, 1),
        int(_number({"max_tokens": limit}, "max_tokens", 1024, 1, MAX_TOKENS)),
        _schema(wants),
    )


def _schema(wants: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a `response_format`; any object's where it asks for JSON only, None where it asks for text."""
    kind = wants.get("type", "text") if isinstance(wants, dict) else "text"
    if kind == "json_object":
        return {"type": "object"}
    found = (wants.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if kind == "json_schema" and not isinstance(found, dict):
        raise ApiError(400, "response_format.json_schema.schema must be an object", param="response_format")
    return found


def _number(asked: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low} to {high}, not {shown(repr(value), 60)}", param=name)
    return value


def _completion(generator: Generator, done: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": None if done.refusal else done.text, "refusal": done.refusal}
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": done.model or generator.model_id,
        "system_fingerprint": generator.fingerprint,
        "choices": [{"index": 0, "message": message, "finish_reason": done.finish_reason, "logprobs": None}],
        **({"note": done.note} if done.note else {}),
        "usage": {
            "prompt_tokens": done.tokens_in,
            "completion_tokens": done.tokens_out,
            "total_tokens": done.tokens_in + done.tokens_out,
        },
    }


def _json(body: Any, status: int = 200) -> Response:
    return Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"), status, media_type="application/json"
    )


def _child() -> None:
    """The background process: announce the port on stdout as one JSON line, serve, end when the parent is gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("generator")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("parent", type=int)
    parser.add_argument("--load", type=int, nargs=2, help="most tokens of an answer, requests that wait at once")
    parser.add_argument("plugins", nargs="*")
    given = parser.parse_args()
    threading.Thread(target=_end_with_parent, args=(given.parent,), daemon=True).start()
    try:
        load_plugins(given.plugins)
        made = create(given.generator, given.options)
        listening = _bind("127.0.0.1", 0)
    except Exception as error:
        kind = "user" if isinstance(error, UserError) else type(error).__name__
        print(json.dumps({"error": str(error), "kind": kind}), flush=True)
        raise SystemExit(1) from error
    ready = {"port": listening.getsockname()[1], "model": made.model_id, "fingerprint": made.fingerprint}
    if hasattr(made, "limit_s") and given.load:
        ready["limit_s"] = made.limit_s(*given.load)
    print(json.dumps(ready), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads this pipe from now on: never block on it
    _server(made, os.environ.get("UNTETHER_GATEWAY_KEY")).run(sockets=[listening])


def _end_with_parent(parent: int) -> None:
    """Poll for the parent: a closed pipe alone does not tell, for a forked sibling may hold its other end."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(_child())
