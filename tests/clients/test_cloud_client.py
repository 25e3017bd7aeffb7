"""The asking client against servers that misbehave for real: every fault is injected over a loopback socket."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import pytest

from clients.answer_cache import AnswerCache
from clients.augmentation import answer_request, merge_outcomes, samples_from, samples_requests
from clients.cloud_client import CloudClient
from clients.cloud_faults import retry_after_s
from sim.errors import ResumableStop, UserError
from sim.population.tasks import get_task
from sim.protocol import format_samples, parse_request
from sim.records import Interaction

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


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    served = Cloud()
    yield served
    served.close()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret-123")


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


def test_the_cache_pays_once_and_a_replicate_is_a_new_draw(cloud, tmp_path):
    cache = str(tmp_path / "sub" / "cache.sqlite")
    cloud.script = [says("not json"), good]
    [first] = client(cloud, cache=cache).ask_sync(orders())
    assert not first.cached and len(cloud.bodies) == 2
    [again] = client(cloud, cache=cache).ask_sync(orders())
    assert again.cached and again.ok and again.pairs == first.pairs and len(cloud.bodies) == 2
    same = [(a.draw, a.outcome, a.tokens_in, a.bytes_up, a.bytes_down) for a in first.attempts]
    assert [(a.draw, a.outcome, a.tokens_in, a.bytes_up, a.bytes_down) for a in again.attempts] == same
    for changed in (orders(seed=1), orders(round=1), orders(items=1)):
        client(cloud, cache=cache).ask_sync(changed)
    client(cloud, cache=cache, temperature=0.1).ask_sync(orders())
    client(cloud, cache=cache, model="other").ask_sync(orders())
    assert len(cloud.bodies) == 7


def test_the_cache_knows_the_variant_but_not_the_port(cloud, tmp_path):
    config = Settings(cache=str(tmp_path / "c"))
    CloudClient(config, base_url=cloud.base_url, variant="fp_a").ask_sync(orders())
    [same] = CloudClient(config, base_url="http://127.0.0.1:9/v1", variant="fp_a").ask_sync(orders())
    assert same.cached
    [other] = CloudClient(config, base_url=cloud.base_url, variant="fp_b").ask_sync(orders())
    assert not other.cached


def test_only_good_answers_are_cached_and_a_stopped_run_keeps_them(cloud, tmp_path):
    cache = str(tmp_path / "c")
    cloud.script = [good, good, says(None, refusal="no"), fails(500)]
    with pytest.raises(ResumableStop):
        client(cloud, cache=cache, concurrency=1, max_retries=1).ask_sync(orders(5))
    asked = len(cloud.bodies)
    cloud.script = [good]
    replies = client(cloud, cache=cache, concurrency=1).ask_sync(orders(5))
    assert [reply.cached for reply in replies] == [True, True, False, False, False]
    assert all(reply.ok for reply in replies) and len(cloud.bodies) == asked + 3


def test_a_file_that_is_no_cache_is_refused(cloud, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, and they are longer than a header " * 20)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE mine (x)")
    for path in (text, other, tmp_path):
        with pytest.raises(UserError, match="cloud.cache"):
            client(cloud, cache=str(path)).ask_sync(orders())
    assert text.read_text().startswith("these are my notes") and not cloud.bodies


def test_a_full_disk_stops_resumably(tmp_path):
    cache = AnswerCache(tmp_path / "c")
    cache._database.execute("PRAGMA max_page_count = 4")  # SQLite's own way to be out of room
    with pytest.raises(ResumableStop, match="full"):
        for number in range(100):
            cache.put(f"key-{number}", {"text": "x" * 1000})
    assert len(cache) > 0
    cache.close()


def _fill(path: str, start: int) -> None:
    cache = AnswerCache(path)
    for number in range(start, start + 60):
        cache.put(f"key-{number}", {"by": start})
    cache.close()


def test_several_processes_may_share_a_cache_from_its_first_moment(tmp_path):
    with ProcessPoolExecutor(6, mp_context=get_context("fork")) as pool:
        for attempt in range(8):
            path = str(tmp_path / f"cache-{attempt}")
            list(pool.map(_fill, [path] * 6, [0, 0, 30, 100, 200, 300]))
            cache = AnswerCache(path)
            assert len(cache) == 90 + 3 * 60
            assert cache.first(["nothing", "key-250"]) == {"by": 200}
            cache.close()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "250", "retry-after": "7"}, 0.25), ({"retry-after": "-1"}, None),
     ({"retry-after": "soon"}, None), ({}, None), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0)],
)  # fmt: skip
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after_s(headers) == seconds
