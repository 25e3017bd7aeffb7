"""The asking client against servers that misbehave for real: every fault is injected over a loopback socket."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from tests.clients.scripted_cloud import (
    KEY,
    PAIRS,
    Handler,
    Settings,
    client,
    completion,
    cut_mid_body,
    drip,
    fails,
    good,
    hang,
    html,
    orders,
    outcomes,
    says,
)
from untether.clients.cloud.client import CloudClient
from untether.clients.cloud.faults import retry_after_s
from untether.clients.device.augmentation import answer_request, merge_outcomes, samples_from, samples_requests
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.records import Interaction
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import format_samples, parse_request

pytestmark = pytest.mark.usefixtures("cloud_key")


def test_a_good_answer_is_counted_in_full(cloud):
    [reply] = client(cloud).ask_sync(orders())
    [attempt] = reply.attempts
    assert reply.ok and [p.output for p in reply.pairs] == ["out one", "out two"]
    assert (attempt.tokens_in, attempt.tokens_out, attempt.tokens_estimated) == (11, 7, False)
    assert (reply.model, reply.fingerprint) == ("m-2026", "fp_1")
    assert attempt.bytes_up == int(cloud.headers[0]["content-length"])
    assert attempt.bytes_down == len(json.dumps(completion(PAIRS)))
    body = cloud.bodies[0]
    assert body["temperature"] == 0.8 and body["max_tokens"] == 256 and body["response_format"]["type"] == "json_schema"
    assert "user" not in body and 0 <= body["seed"] < 2**31
    assert cloud.headers[0]["authorization"] == "Bearer sk-secret-123"


def test_tokens_are_estimated_and_marked_where_the_endpoint_reports_none(cloud):
    cloud.script = [says(PAIRS, usage=False)]
    [reply] = client(cloud).ask_sync(orders())
    attempt = reply.attempts[0]
    text = sum(-(-len(m["content"]) // 4) for m in cloud.bodies[0]["messages"])
    assert attempt.tokens_estimated and attempt.tokens_in == text and attempt.tokens_out == -(-len(PAIRS) // 4)


def test_429_waits_as_long_as_retry_after_says(cloud):
    cloud.script = [fails(429, retry_after="0.4"), good]
    [reply] = client(cloud).ask_sync(orders())
    assert outcomes(reply) == ["rate_limited", "ok"]
    assert cloud.times[1] - cloud.times[0] >= 0.4


def test_429_holds_back_every_asker(cloud):
    def later(handler: Handler) -> None:
        time.sleep(0.2)
        good(handler)

    cloud.script = [fails(429, retry_after="0.6"), later, good]
    replies = client(cloud, concurrency=2).ask_sync(orders(6))
    assert all(reply.ok for reply in replies)
    held = [moment - cloud.times[0] for moment in cloud.times[2:]]  # the second was in flight already
    assert min(held) >= 0.6


def test_a_wait_beyond_patience_stops_at_once(cloud):
    cloud.script = [fails(429, retry_after="3600")]
    with pytest.raises(ResumableStop, match="3600 s"):
        client(cloud).ask_sync(orders())
    assert len(cloud.bodies) == 1


def test_an_exhausted_quota_is_not_retried(cloud):
    cloud.script = [fails(429, "You exceeded your current quota", "insufficient_quota")]
    with pytest.raises(ResumableStop, match="quota"):
        client(cloud).ask_sync(orders())
    assert len(cloud.bodies) == 1


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [(fails(500), "server_error"), (fails(503, retry_after="0"), "server_error"), (cut_mid_body, "dropped"),
     (html, "not_an_answer"), (hang, "timeout"), (drip, "timeout")],
)  # fmt: skip
def test_a_passing_fault_of_the_wire_is_retried_with_the_same_draw(cloud, fault, outcome):
    cloud.script = [fault, good]
    [reply] = client(cloud, timeout_s=0.5).ask_sync(orders())
    assert outcomes(reply) == [outcome, "ok"]
    assert cloud.bodies[0]["seed"] == cloud.bodies[1]["seed"]
    assert reply.attempts[0].tokens_in is None and reply.attempts[1].draw == 0


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [(fails(500), "server_error"), (fails(429), "rate_limited"), (cut_mid_body, "dropped"), (html, "not_an_answer"),
     (hang, "timeout")],
)  # fmt: skip
def test_a_lasting_fault_stops_virtual_time_and_is_an_outcome_on_the_wall(cloud, fault, outcome):
    cloud.script = [fault]
    with pytest.raises(ResumableStop, match=outcome):
        client(cloud, timeout_s=0.3, max_retries=1).ask_sync(orders())
    assert len(cloud.bodies) == 2
    [reply] = client(cloud, wall=True, timeout_s=0.3, max_retries=1).ask_sync(orders())
    assert reply.outcome == outcome and outcomes(reply) == [outcome] * 2


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    config = Settings(base_url=base_url, max_retries=1)
    with pytest.raises(ResumableStop, match="unreachable after 2 attempts"):
        CloudClient(config, backoff_s=0.01).ask_sync(orders())
    [reply] = CloudClient(config, wall=True, backoff_s=0.01).ask_sync(orders())
    assert reply.outcome == "unreachable"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_the_users_mistake_and_never_shown(cloud, status):
    cloud.script = [fails(status, "Incorrect API key provided: sk-secret-123")]
    with pytest.raises(UserError) as caught:
        client(cloud).ask_sync(orders(9))
    message = str(caught.value)
    assert cloud.base_url in message and KEY in message and "sk-secret-123" not in message
    assert len(cloud.bodies) <= 4  # as many as were in flight


def test_a_missing_key_is_named(cloud, monkeypatch):
    monkeypatch.delenv(KEY)
    cloud.script = [fails(401)]
    with pytest.raises(UserError, match=f"{KEY} .* is not set"):
        client(cloud).ask_sync(orders())


def test_an_unknown_model_is_the_users_mistake(cloud):
    cloud.script = [fails(404, "The model `m` does not exist", "model_not_found")]
    with pytest.raises(UserError, match="cloud.model = 'm'"):
        client(cloud).ask_sync(orders())
    assert len(cloud.bodies) == 1


@pytest.mark.parametrize("url", ["", "example.com/v1", "ftp://x/v1", "http:///v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="cloud.base_url"):
        CloudClient(Settings(base_url=url))


def test_an_endpoint_without_structured_output_is_asked_plainly_from_then_on(cloud):
    def picky(handler: Handler) -> None:
        unknown = "response_format" in cloud.bodies[-1]
        (fails(400, "response_format is not supported") if unknown else good)(handler)

    cloud.script = [picky]
    asked = client(cloud, concurrency=1, max_retries=0)
    replies = asked.ask_sync(orders(3))
    assert [outcomes(reply) for reply in replies] == [["rejected", "ok"], ["ok"], ["ok"]]
    assert asked.left_out == {"response_format"} and len(cloud.bodies) == 4


def test_an_endpoint_that_wants_max_completion_tokens_gets_it(cloud):
    def picky(handler: Handler) -> None:
        old = "max_tokens" in cloud.bodies[-1]
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        (fails(400, message, "unsupported_parameter", "max_tokens") if old else good)(handler)

    cloud.script = [picky]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.ok and cloud.bodies[1]["max_completion_tokens"] == 256 and "response_format" in cloud.bodies[1]


def test_a_request_that_is_rejected_anyway_is_the_users_mistake(cloud):
    cloud.script = [fails(400, "maximum context length is 100 tokens", "context_length_exceeded")]
    with pytest.raises(UserError, match="maximum context length"):
        client(cloud).ask_sync(orders())
    assert len(cloud.bodies) == 1


@pytest.mark.parametrize(
    "refusal", [says(None, refusal="I cannot help with that"), says("", finish="content_filter"),
                fails(400, "filtered", "content_filter")],
)  # fmt: skip
def test_a_refusal_is_an_outcome_and_not_retried(cloud, refusal):
    cloud.script = [refusal, good]
    replies = client(cloud, concurrency=1).ask_sync(orders(2))
    assert [reply.outcome for reply in replies] == ["refused", "ok"]
    assert outcomes(replies[0]) == ["refused"]


def test_a_truncated_answer_is_salvaged(cloud):
    cloud.script = [says(PAIRS[:-12], finish="length")]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.ok and [p.input for p in reply.pairs] == ["in one"]
    assert reply.attempts[0].finish_reason == "length" and "truncated=1" in reply.attempts[0].detail


def test_a_malformed_answer_is_drawn_again_and_then_given_up(cloud):
    cloud.script = [says("I would love to help!"), good]
    [reply] = client(cloud).ask_sync(orders())
    assert outcomes(reply) == ["malformed", "ok"] and [a.draw for a in reply.attempts] == [0, 1]
    assert cloud.bodies[0]["seed"] != cloud.bodies[1]["seed"]
    cloud.script = [says("I would love to help!")]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.outcome == "malformed" and outcomes(reply) == ["malformed"] * 3 and reply.pairs == ()


def test_an_answer_without_a_usable_pair(cloud):
    cloud.script = [says('{"samples": [{"input": "", "output": "x"}, {"output": "y"}]}')]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.outcome == "no_samples" and reply.problems == {"empty_field": 1, "missing_field": 1}
    assert len(cloud.bodies) == 1


def test_a_large_order_is_split_and_its_parts_are_draws_of_their_own(cloud):
    requests = orders(1, count=19)
    assert [(r.request_id, r.count) for r in requests] == [("r0", 8), ("r0+1", 8), ("r0+2", 3)]
    assert [parse_request(r.messages).count for r in requests] == [8, 8, 3]
    assert all([u.item_id for u in r.uploaded] == ["i1", "i0"] for r in requests)
    replies = client(cloud).ask_sync(requests)
    assert len({body["seed"] for body in cloud.bodies}) == 3
    samples = samples_from(requests, replies)
    assert [s.sample_id for s in samples] == ["r0/0", "r0/1", "r0+1/0", "r0+1/1", "r0+2/0", "r0+2/1"]
    assert merge_outcomes(replies) == "ok"


def test_more_pairs_than_asked_are_left_out_and_labels_get_their_spelling(cloud):
    cloud.script = [says(format_samples([("a", "Sports "), ("b", "unheard of"), ("c", "crime")]))]
    items = [Interaction("i", "LaMP_2N", "text", "sports")]
    requests = samples_requests(get_task("LaMP_2N"), items, 2, request_id="r", device_id="d", seed=0, round=0)
    samples = samples_from(requests, client(cloud).ask_sync(requests))
    assert [s.output for s in samples] == ["sports", "unheard of"]
    schema = cloud.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["samples"]["items"]
    assert "crime" in schema["properties"]["output"]["enum"]


def test_the_cloud_arm_asks_for_text(cloud):
    cloud.script = [says("  A headline\n")]
    items = [Interaction("i", "LaMP_4", "text", "title")]
    request = answer_request(
        get_task("LaMP_4"), items, "an article", "q1", request_id="r", device_id="d", seed=0, round=0
    )
    [reply] = client(cloud).ask_sync([request])
    assert reply.ok and reply.text == "A headline"
    assert "response_format" not in cloud.bodies[0] and cloud.bodies[0]["temperature"] == 0.0
    assert [(u.item_id, u.chars) for u in request.uploaded] == [("i", 9), ("q1", 10)]


def test_concurrency_is_bounded_and_the_order_is_kept(cloud):
    lock, now, most = threading.Lock(), [0], [0]

    def slow(handler: Handler) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        good(handler)

    cloud.script = [slow]
    seen: list[str] = []
    requests = orders(20)
    replies = client(cloud, concurrency=3).ask_sync(requests, on_done=lambda reply: seen.append(reply.request_id))
    assert most[0] == 3
    assert [r.request_id for r in replies] == [r.request_id for r in requests]
    assert sorted(seen) == sorted(r.request_id for r in requests)
    assert len(cloud.bodies) == 20


def test_first_come_first_served(cloud):
    requests = orders(8)
    client(cloud, concurrency=1).ask_sync(requests)
    seeds = [body["seed"] for body in cloud.bodies]
    cloud.bodies.clear()
    for request in requests:
        client(cloud).ask_sync([request])
    assert [body["seed"] for body in cloud.bodies] == seeds


def test_a_stop_ends_the_asking(cloud):
    cloud.script = [good, hang]
    stop = threading.Event()
    with pytest.raises(ResumableStop, match="stopped"):
        client(cloud, concurrency=1).ask_sync(orders(5), on_done=lambda _: stop.set(), stop=stop)
    assert len(cloud.bodies) <= 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "250", "retry-after": "7"}, 0.25), ({"retry-after": "-1"}, None),
     ({"retry-after": "soon"}, None), ({}, None), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0)],
)  # fmt: skip
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after_s(headers) == seconds
