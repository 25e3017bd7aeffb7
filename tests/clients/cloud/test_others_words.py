"""What endpoints of other makers say in words and forms of their own."""

from __future__ import annotations

import json

import pytest

from tests.clients.cloud.test_dialects import asked, events, question, raw
from tests.clients.scripted_cloud import KEY, PAIRS, Cloud, client, completion, good, orders, outcomes, says, send
from untether.clients.cloud.answer import read_answer, unwrapped
from untether.clients.cloud.faults import wait_in_words
from untether.sim.core.errors import ResumableStop, UserError


@pytest.fixture
def cloud(monkeypatch):
    monkeypatch.setenv(KEY, "a-key-of-nobody")
    opened = Cloud()
    yield opened
    opened.close()


def error(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


REFUSALS = {
    "a thinking model": ("stream", 400, error("enable_thinking must be set to false for non-streaming calls")),
    "a stream alone": ("stream", 400, {"detail": "Stream must be set to true"}),
    "a router without words": ("seed", 404, error("No endpoints found that can handle the requested parameters.")),
    "a failure that names": ("seed", 500, error("UnsupportedParamsError: does not support parameters: ['seed']")),
    "a role in a list": ("system", 400, error("messages[0].role does not support 'system'", param="messages[0].role")),
    "extra inputs": ("temperature", 400, {"type": "error", **error("temperature: Extra inputs are not permitted")}),
    "both at once": ("top_p", 400, error("`temperature` and `top_p` cannot both be specified for this model")),
}  # fmt: skip


def holds(body: dict, change: str) -> bool:
    if change == "stream":
        return not body.get("stream")
    return body["messages"][0]["role"] == "system" if change == "system" else change in body


@pytest.mark.parametrize(("change", "status", "body"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_is_dropped_in_whatever_words(cloud, change, status, body):
    def served(handler) -> None:
        if cloud.bodies[-1].get("stream"):
            send(handler, 200, events(PAIRS), "text/event-stream")
        else:
            good(handler)

    cloud.script = [lambda handler: (raw(status, body) if holds(cloud.bodies[-1], change) else served)(handler)]
    asked = client(cloud, top_p=0.9, concurrency=1)
    assert all(reply.ok for reply in asked.ask_sync(orders(2)))
    assert change in asked.left_out and not holds(cloud.bodies[-1], change)


def test_a_key_that_is_refused_as_a_bad_request_is_not_tried_in_other_ways(cloud):
    cloud.script = [raw(400, [error("API key not valid. Please pass a valid API key.", status="INVALID_ARGUMENT")])]
    with pytest.raises(UserError, match=f"refuses the key in the environment variable {KEY}.*not valid"):
        client(cloud, concurrency=1).ask_sync(orders())
    assert len(cloud.bodies) == 1


def test_a_stream_that_is_kept_alive_by_comments_is_read(cloud):
    body = ": PROCESSING\n\n: PROCESSING\n\n" + events(PAIRS)
    cloud.script = [lambda handler: send(handler, 200, body, "text/event-stream")]
    assert len(client(cloud).ask_sync(orders())[0].pairs) == 2


def test_an_answer_that_ends_in_an_error_is_one(cloud):
    cloud.script = [says("", finish="error")]
    with pytest.raises(ResumableStop, match="server_error after 2 attempts.*finish_reason = error"):
        client(cloud, max_retries=1).ask_sync(orders())


@pytest.mark.parametrize(("said", "meant"), [
    ("MAX_TOKENS", "length"), ("max_output_tokens", "length"), ("content_filter: OTHER", "content_filter"),
    ("SAFETY", "content_filter"), ("stop", "stop"), ("end_turn", "end_turn"), (None, ""),
])  # fmt: skip
def test_why_an_answer_ended_is_read_in_others_words(said, meant):
    assert read_answer(json.dumps(completion("x", finish=said)).encode()).finish_reason == meant


def test_an_answer_that_stands_in_the_reasoning_alone_is_said(cloud):
    body = completion(None)
    body["choices"][0]["message"]["reasoning_content"] = PAIRS
    cloud.script = [raw(200, body)]
    for reply in client(cloud, max_retries=1).ask_sync([*orders(), question()]):
        assert outcomes(reply) == ["malformed"] * 2
        assert reply.attempts[-1].detail.endswith("an empty answer, beside its reasoning")


@pytest.mark.parametrize("thought", ["◁think▷hm◁/think▷", "<|START_THINKING|>hm<|END_THINKING|>"])
def test_reasoning_in_other_marks_is_no_answer(thought):
    answer = read_answer(json.dumps(completion(f"{thought}\nA title")).encode())
    assert answer.text.strip() == "A title" and answer.thought


@pytest.mark.parametrize(("written", "meant"), [
    ("<answer>\nA title\n</answer>", "A title"), ("<b>A title</b>", "<b>A title</b>"), ("<answer>open", "<answer>open"),
])  # fmt: skip
def test_an_answer_in_a_tag_is_the_answer(written, meant):
    assert unwrapped(written) == meant


@pytest.mark.parametrize(("text", "seconds"), [
    ("Please try again in 7m12.5s.", 432.5), ("again in 1h 2m 3s", 3723.0), ('{"retry_after": 20}', 20.0),
    ('{"retry_after_seconds": "1.5", "x": 1}', 1.5), ("{'retry_after': true}", None), ("again in 3 models", None),
])  # fmt: skip
def test_delays_in_several_units_and_in_fields(text, seconds):
    assert wait_in_words(text) == seconds


# --- what stands between --------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """No proxy and no certificates of the environment's own."""
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_an_endpoint_without_tls_is_told_as_one(bare, cloud):
    with pytest.raises(ResumableStop, match="speaks no TLS.*give its http:// address"):
        asked(cloud.base_url.replace("http:", "https:")).ask_sync(orders())


def test_a_proxy_that_does_not_answer_is_named_without_its_password(bare):
    bare.setenv("HTTPS_PROXY", "http://me:word@127.0.0.1:9")
    with pytest.raises(ResumableStop, match="proxy .*HTTPS_PROXY=http://127.0.0.1:9") as caught:
        asked("https://cloud.invalid/v1").ask_sync(orders())
    assert "word" not in str(caught.value)


def test_the_environments_certificates_count_on_this_machine_too(bare):
    bare.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    with pytest.raises(UserError, match="SSL_CERT_FILE"):
        asked("https://127.0.0.1:9/v1").ask_sync(orders())
