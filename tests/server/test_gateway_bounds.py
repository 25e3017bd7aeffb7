"""What a request may hold and ask for, whoever sends it: an error of the API, and the endpoint lives on."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from untether.server import gateway
from untether.server.gateway import create_app
from untether.server.generator import create
from untether.sim.core.records import Interaction
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import NotARequest, build_samples_request, parse_request

ITEMS = [Interaction(f"i{k}", "LaMP_4", f"One {k}. Two {k}. Three {k}.", f"title {k}") for k in range(4)]
MESSAGES = list(build_samples_request(get_task("LaMP_4"), ITEMS, 2).messages)


@pytest.fixture(scope="module")
def served():
    with TestClient(create_app(create("recombine", {})), raise_server_exceptions=False) as client:
        yield client


def ask(served, **fields):
    body = {"model": "recombine", "messages": MESSAGES, **fields}
    return served.post("/v1/chat/completions", content=body if isinstance(body, bytes) else json.dumps(body))


@pytest.mark.parametrize(("fields", "param"), [
    ({"max_tokens": 10**9}, "max_tokens"), ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"), ({"temperature": "hot"}, "temperature"), ({"n": 2}, "n"),
    ({"seed": 1.0e300}, "seed"), ({"model": "x" * 10_000}, "model"),
])  # fmt: skip
def test_a_request_beyond_bounds_is_an_error_that_names_the_field(served, fields, param):
    reply = ask(served, **fields)
    assert 400 <= reply.status_code < 500 and reply.json()["error"]["param"] == param
    assert len(reply.content) < 1000
    assert ask(served).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b"9" * 9999]
)
def test_a_body_that_is_no_request(served, body):
    assert served.post("/v1/chat/completions", content=body).status_code == 400


def test_a_body_that_is_too_large_ends(served, monkeypatch):
    monkeypatch.setattr(gateway, "MAX_BODY_BYTES", 10_000)
    assert served.post("/v1/chat/completions", content=b" " * 20_000).status_code == 413
    assert ask(served).status_code == 200


def test_a_request_may_not_ask_for_endless_pairs():
    many = [{**m, "content": m["content"].replace("Write 2 new", "Write 999999 new")} for m in MESSAGES]
    with pytest.raises(NotARequest, match="more than 1024 pairs"):
        parse_request(many)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)  # fmt: skip
names = st.sampled_from((
    "model", "messages", "temperature", "top_p", "max_tokens", "seed", "n", "stream", "response_format", "stop",
))  # fmt: skip


@settings(max_examples=150)
@given(st.dictionaries(names, values, max_size=6), st.booleans())
def test_whatever_a_request_says_it_is_answered_or_refused(served, fields, whole):
    body = {"model": "recombine", "messages": MESSAGES, **fields} if whole else fields
    reply = served.post("/v1/chat/completions", content=json.dumps(body))
    assert reply.status_code < 500 and ("error" in reply.json()) == (reply.status_code != 200)
