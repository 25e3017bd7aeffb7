"""Endpoints as there are many: what they refuse, how they say it, and how they answer."""

from __future__ import annotations

import json

import pytest

from tests.clients.scripted_cloud import PAIRS, Handler, client, completion, fails, good, orders, outcomes, says, send
from untether.clients.cloud.answer import ErrorInside, NotAnAnswer, Unusable, read_answer, split_thought, unwrapped
from untether.clients.cloud.client import CloudClient
from untether.clients.cloud.faults import wait_in_words
from untether.clients.device.augmentation import answer_request
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.records import CUT, Interaction
from untether.sim.population.tasks import get_task

pytestmark = pytest.mark.usefixtures("cloud_key")


def question(text: str = "an article"):
    items = [Interaction("i", "LaMP_4", "text", "title")]
    return answer_request(get_task("LaMP_4"), items, text, "q1", request_id="r", device_id="d", seed=0, round=0)


def unless(cloud, refused, refusal):
    """Answers well, but for a request of which `refused(body)` is true."""
    def behave(handler: Handler) -> None:
        (refusal if refused(cloud.bodies[-1]) else good)(handler)

    return behave


def raw(status: int, body: object):
    return lambda handler: send(handler, status, body)


SEED = "no such field is allowed here"
PYDANTIC = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": SEED, "input": 7}]}
REFUSALS = {
    "fastapi": raw(422, PYDANTIC),
    "an object within the message": raw(422, {"object": "error", "message": PYDANTIC, "type": "x", "code": None}),
    "a list around it": raw(400, [{"error": {"code": 400, "message": 'unknown name "seed"', "status": "INVALID"}}]),
    "python's own writing": raw(400, {"object": "error", "message": "[{'loc': ('body', 'seed')}]", "code": 400}),
    "a text alone": raw(400, {"error": "`seed` is not supported by this model"}),
    "openai": fails(400, "Unsupported parameter", "unsupported_parameter", "seed"),
    "no json": lambda handler: send(handler, 400, "unknown argument: seed", "text/plain"),
}  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_parameter_that_an_error_names_is_left_out_from_then_on(cloud, refusal):
    cloud.script = [unless(cloud, lambda body: "seed" in body, refusal)]
    asked = client(cloud, concurrency=1)
    replies = asked.ask_sync(orders(2))
    assert [outcomes(reply) for reply in replies] == [["rejected", "ok"], ["ok"]]
    assert asked.left_out == {"seed"} and "response_format" in cloud.bodies[-1]


def test_a_parameter_that_no_error_names_is_found_by_leaving_out_one_at_a_time(cloud):
    cloud.script = [unless(cloud, lambda body: "temperature" in body, fails(400, "Bad request"))]
    asked = client(cloud, concurrency=4)
    assert all(reply.ok for reply in asked.ask_sync(orders(4)))
    assert asked.left_out == {"temperature"} and "seed" in cloud.bodies[-1]
    assert sum("temperature" in body for body in cloud.bodies) <= 4 + 3  # nobody looks for it twice


def test_two_parameters_that_no_error_names(cloud):
    cloud.script = [unless(cloud, lambda body: {"seed", "response_format"} & set(body), fails(400, "Bad request"))]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.ok


def test_what_an_endpoint_refuses_is_remembered_by_the_next_pass(cloud, tmp_path):
    cloud.script = [unless(cloud, lambda body: "seed" in body, REFUSALS["fastapi"])]
    for seed in (1, 2):
        replies = client(cloud, cache=str(tmp_path / "answers.sqlite")).ask_sync(orders(seed=seed))
        assert replies[0].ok
    assert ["seed" in body for body in cloud.bodies] == [True, False, False]


def test_a_reasoning_model_takes_its_own_sampling_alone(cloud):
    def picky(handler: Handler) -> None:
        body = cloud.bodies[-1]
        for name, wrong in (("max_tokens", "use 'max_completion_tokens'"), ("temperature", "only 1"), ("top_p", "no")):
            if name in body:
                return fails(400, f"Unsupported: '{name}', {wrong}", "unsupported_value", name)(handler)
        good(handler)

    cloud.script = [picky]
    [reply] = client(cloud, top_p=0.9).ask_sync(orders())
    assert reply.ok and {"max_completion_tokens", "seed", "response_format"} <= set(cloud.bodies[-1])


def test_top_p_is_sent_only_where_it_says_something(cloud):
    client(cloud).ask_sync(orders())
    client(cloud, top_p=0.9).ask_sync(orders())
    assert ["top_p" in body for body in cloud.bodies] == [False, True]


def test_fewer_tokens_are_asked_for_where_the_endpoint_writes_fewer(cloud):
    refusal = fails(400, "max_tokens is above the 64 that this model writes", "invalid_value", "max_tokens")
    cloud.script = [unless(cloud, lambda body: body.get("max_tokens", 0) > 64, refusal)]
    [reply] = client(cloud).ask_sync(orders())
    assert reply.ok and cloud.bodies[-1]["max_tokens"] == 64


@pytest.mark.parametrize(("status", "words"), [
    (400, "the template has no system role"), (500, "Jinja: no system role"),
    (400, "Conversation roles must alternate user/assistant"), (400, "Developer instruction is not enabled"),
])  # fmt: skip
def test_system_text_moves_into_the_users_turn(cloud, status, words):
    cloud.script = [unless(cloud, lambda body: body["messages"][0]["role"] == "system", fails(status, words))]
    [request] = orders()
    [reply] = client(cloud).ask_sync([request])
    [turn] = cloud.bodies[-1]["messages"]
    assert reply.ok and turn["role"] == "user"
    assert all(message["content"] in turn["content"] for message in request.messages)


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_a_schema_that_a_server_stumbles_over_is_not_asked_for_again(cloud, retries):
    cloud.script = [unless(cloud, lambda body: "response_format" in body, fails(500, "could not be built"))]
    asked = client(cloud, max_retries=retries, concurrency=1)
    assert all(reply.ok for reply in asked.ask_sync(orders(3)))
    assert asked.left_out == {"response_format"} and len(cloud.bodies) <= 3 + 2


def test_an_error_within_a_success_is_an_error_in_its_own_words(cloud):
    within = completion("", finish="error")
    within["choices"][0]["error"] = {"code": 502, "message": "upstream broke"}
    cloud.script = [raw(200, within)]
    with pytest.raises(ResumableStop, match="server_error after 2 attempts.*upstream broke"):
        client(cloud, max_retries=1).ask_sync(orders())
    cloud.script = [raw(200, {"error": {"message": "router failed", "code": 429, "metadata": {"raw": "slow down"}}})]
    with pytest.raises(ResumableStop, match=r"rate_limited after 2.*router failed; slow down") as caught:
        client(cloud, max_retries=1).ask_sync(orders())
    assert "base_url complete" not in str(caught.value)
    cloud.script = [raw(200, {"choices": None, "msg": "the prompt is too long", "status": "400"})]
    with pytest.raises(UserError, match="the prompt is too long.*cloud.show_items"):
        client(cloud).ask_sync(orders())


@pytest.mark.parametrize("body", [
    {"error": {"message": "m", "metadata": {"raw": '{"error": {"message": "the reason"}}'}}}, {"detail": "the reason"},
    {"error": ["the reason"]}, {"message": {"detail": [{"msg": "the reason"}]}}, ["the reason"], "the reason",
    {"error": {"status": {"inner": {"why": "the reason"}}}},
])  # fmt: skip
def test_the_message_holds_the_endpoints_own_words_whatever_their_shape(cloud, body):
    cloud.script = [raw(403, body)]
    with pytest.raises(UserError, match="the reason"):
        client(cloud).ask_sync(orders())


def test_a_users_text_that_an_error_repeats_is_not_passed_on(cloud):
    secret = "The diary of that summer says that nobody came to the ferry, and that it rained for three weeks."

    def echo(handler: Handler) -> None:
        sent = cloud.bodies[-1]["messages"][-1]["content"]
        send(handler, 403, {"error": {"message": "not allowed", "input": sent, "quoted": f"you said: {sent}"}})

    cloud.script = [echo]
    with pytest.raises(UserError) as caught:
        client(cloud).ask_sync([question(secret)])
    assert "not allowed" in str(caught.value) and "diary" not in str(caught.value)


# --- waiting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [
    ("Please try again in 20s.", 20.0), ("again in 1.5 seconds", 1.5), ('"retryDelay": "7s"', 7.0),
    ("retry after 250ms", 0.25), ("Retry in 2 minutes", 120.0), ("used 5 of 5 requests", None), ("", None),
])  # fmt: skip
def test_delays_are_read_from_words(text, seconds):
    assert wait_in_words(text) == seconds


def test_a_delay_in_the_body_is_kept(cloud):
    body = {"error": {"code": 429, "message": "quota", "details": [{"@type": "RetryInfo", "retryDelay": "0.3s"}]}}
    cloud.script = [raw(429, body), good]
    [reply] = client(cloud).ask_sync(orders())
    assert outcomes(reply) == ["rate_limited", "ok"] and cloud.times[1] - cloud.times[0] >= 0.3


def test_an_endpoint_that_loads_its_model_is_waited_for(cloud):
    cloud.script = [fails(503, "Loading model")] * 4 + [good]
    [reply] = client(cloud, max_retries=0).ask_sync(orders())
    assert reply.ok
    cloud.script = [fails(503, "Loading model")]
    with pytest.raises(ResumableStop, match="Loading model"):
        client(cloud, max_retries=0, max_wait_s=0.1).ask_sync(orders())


# --- reasoning ------------------------------------------------------------------------------------------------

DRAFT = '{"samples": [{"input": "a draft", "output": "thrown away"}]}'


@pytest.mark.parametrize("thought", [
    f"<think>\nPerhaps {DRAFT}? No.\n</think>\n\n", f"Perhaps {DRAFT}? No.\n</think>\n", "[THINK]hm[/THINK]",
    "<Thinking>hm</Thinking>", f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final"
    "<|message|>",
])  # fmt: skip
def test_reasoning_is_neither_sample_nor_answer(cloud, thought):
    cloud.script = [says(thought + PAIRS), says(thought + "A headline")]
    found, answered = client(cloud, concurrency=1).ask_sync([*orders(), question()])
    assert [pair.input for pair in found.pairs] == ["in one", "in two"] and found.problems == {}
    assert answered.text == "A headline"


@pytest.mark.parametrize("text", ["I <think> therefore", '{"samples": []} about </think>', "plain", "a [THINK] tank"])
def test_a_text_that_only_speaks_of_thinking_stays(text):
    answer = read_answer(json.dumps(completion(text)).encode())
    assert answer.text == (text if "</think>" not in text else "") and answer.thought == ("</think>" in text)


def test_a_valid_answer_that_quotes_an_end_of_thought_stays():
    text = json.dumps({"samples": [{"input": "a tag </think> in a post", "output": "x"}]})
    assert read_answer(json.dumps(completion(text)).encode()).text == text


def test_reasoning_that_took_all_tokens_is_paid_for_once_and_said(cloud):
    body = completion(None, finish="length")
    body["choices"][0]["message"]["reasoning_content"] = "Let me think"
    cloud.script = [raw(200, body)]
    replies = client(cloud, max_retries=4).ask_sync([*orders(), question()])
    assert len(cloud.bodies) == 2 and {reply.outcome for reply in replies} == {"malformed"}
    assert all(CUT in reply.attempts[-1].detail and "max_tokens" in reply.attempts[-1].detail for reply in replies)


# --- forms of an answer ---------------------------------------------------------------------------------------


def events(text: str) -> str:
    chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"index": 0, "delta": {}}]}
    lines = []
    for at in range(0, len(text), 9):
        chunk["choices"][0]["delta"] = {"content": text[at : at + 9]}
        lines.append(f"data: {json.dumps(chunk)}\n\n")
    return "".join(lines) + "data: [DONE]\n\n"


def test_a_stream_that_nobody_asked_for_is_read(cloud):
    cloud.script = [lambda handler: send(handler, 200, events(PAIRS), "text/event-stream")]
    [reply] = client(cloud).ask_sync(orders())
    assert len(reply.pairs) == 2 and reply.model == "m"


def test_an_endpoint_that_only_streams_is_asked_for_a_stream(cloud):
    def streams(handler: Handler) -> None:
        if not cloud.bodies[-1].get("stream"):
            return fails(400, "This model only supports stream mode")(handler)
        send(handler, 200, events(PAIRS), "text/event-stream")

    cloud.script = [streams]
    assert [len(reply.pairs) for reply in client(cloud).ask_sync(orders(2))] == [2, 2]


def test_content_in_parts_and_answers_as_tools(cloud):
    parts = completion([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": PAIRS}])
    tool = completion(None, finish="tool_calls")
    tool["choices"][0]["message"]["tool_calls"] = [{"function": {"name": "samples", "arguments": PAIRS}}]
    cloud.script = [raw(200, parts), raw(200, tool), says(json.dumps(PAIRS))]
    replies = client(cloud, concurrency=1).ask_sync(orders(3))
    assert [len(reply.pairs) for reply in replies] == [2, 2, 2]


@pytest.mark.parametrize(("written", "meant"), [
    ("```\nA title\n```", "A title"), ('{"output": "A title"}', "A title"), ('{"output": 4}', "4"),
    ('"A title"', "A title"), ("Output: A title", "A title"), ('He said "no" and "yes"', 'He said "no" and "yes"'),
    ('"One" or "two"', '"One" or "two"'), ("Answers: none", "Answers: none"), ("", ""), ("{broken", "{broken"),
])  # fmt: skip
def test_an_answer_without_what_models_put_around_it(written, meant):
    assert unwrapped(written) == meant


@pytest.mark.parametrize(("usage", "tokens"), [
    ({"prompt_tokens": 100.0, "completion_tokens": "50"}, (100, 50)), ({"prompt_tokens": -1}, (None, None)),
    ({"prompt_tokens": 10**30, "completion_tokens": True}, (None, None)), ([], (None, None)), (None, (None, None)),
    ({"prompt_tokens": 1.5, "completion_tokens": {}}, (None, None)),
])  # fmt: skip
def test_only_counts_are_taken_for_counts(usage, tokens):
    answer = read_answer(json.dumps({**completion("x"), "usage": usage}).encode())
    assert (answer.tokens_in, answer.tokens_out) == tokens


def test_names_are_names():
    odd = {**completion("x"), "model": "m\x1b[2J" + "x" * 500, "system_fingerprint": {"a": 1}}
    answer = read_answer(json.dumps(odd).encode())
    assert answer.model.startswith("m\\x1b[2Jxxx") and len(answer.model) < 210 and answer.fingerprint == ""


@pytest.mark.parametrize(("body", "error"), [
    (b"<html>", NotAnAnswer), (b"[]", NotAnAnswer), (b"{}", NotAnAnswer), (b"", NotAnAnswer), (b"data: ", NotAnAnswer),
    (b'{"choices": [{"message": {"content": 5}}]}', Unusable), (b'{"choices": []}', ErrorInside),
    (b'{"choices": [{"message": {"content": "x"', Unusable), (b'{"error": "no"}', ErrorInside),
])  # fmt: skip
def test_bodies_that_are_no_answer(body, error):
    with pytest.raises(error):
        read_answer(body)


# --- bounds ---------------------------------------------------------------------------------------------------


def test_one_answer_beyond_all_bounds_is_counted_and_drawn_again(cloud):
    cloud.script = [says("x" * 300_000), good]
    [reply] = client(cloud).ask_sync(orders())
    assert outcomes(reply) == ["malformed", "ok"] and "larger than" in reply.attempts[0].detail


def test_answers_that_cannot_be_used_end_no_run(cloud):
    nested = '{"choices": [{"message": {"content": ' + "[" * 3000 + "]" * 3000 + "}}]}"
    cloud.script = [lambda handler: send(handler, 200, nested)]
    [reply] = client(cloud, max_retries=1).ask_sync(orders())
    assert outcomes(reply) == ["malformed", "malformed"] and reply.problems["unusable"] == 1


def test_a_compressed_answer_counts_as_long_as_it_unpacks_to(cloud):
    import gzip

    def packed(text: str):
        def behave(handler: Handler) -> None:
            data = gzip.compress(json.dumps(completion(text)).encode())
            handler.send_response(200)
            for name, value in (("Content-Encoding", "gzip"), ("Content-Length", str(len(data)))):
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        return behave

    cloud.script = [packed("x" * 3_000_000), packed(PAIRS)]
    [reply] = client(cloud).ask_sync(orders())
    assert outcomes(reply) == ["malformed", "ok"]


def test_a_redirect_is_not_followed_and_its_target_is_named(cloud):
    def elsewhere(handler: Handler) -> None:
        send(handler, 307, {}, Location=f"{cloud.base_url}/other?token=hidden")

    cloud.script = [elsewhere]
    with pytest.raises(UserError, match="307 sends the request elsewhere to .*/v1/other, and redirects are not") as no:
        client(cloud).ask_sync(orders())
    assert len(cloud.bodies) == 1 and "hidden" not in str(no.value)


# --- what stands between --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "said"), [
    ("ALL_PROXY", "socks://user:word@127.0.0.1:9/", "not known here"), ("ALL_PROXY", "socks5://127.0.0.1:9", "SOCKS"),
    ("SSL_CERT_FILE", "/nonexistent/ca.pem", "certificates"),
])  # fmt: skip
def test_an_environment_that_cannot_be_used_is_told_in_a_sentence(monkeypatch, name, value, said):
    for each in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(each, raising=False)
        monkeypatch.delenv(each.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        asked("https://cloud.invalid/v1").ask_sync(orders())
    assert name in str(caught.value) and "word" not in str(caught.value)


def asked(url: str) -> CloudClient:
    from tests.clients.scripted_cloud import Settings

    return CloudClient(Settings(base_url=url, max_retries=0), backoff_s=0.01)


def test_a_key_never_goes_over_plain_http_to_another_machine(monkeypatch):
    with pytest.raises(UserError, match="plain HTTP.*UNTETHER_TEST_KEY"):
        asked("http://cloud.example/v1")
    assert asked("http://127.0.0.1:9/v1") and asked("http://localhost:9/v1") and asked("https://cloud.example/v1")
    with pytest.raises(UserError, match="plain HTTP"):
        asked("http://127.0.0.1.cloud.example/v1")
    monkeypatch.delenv("UNTETHER_TEST_KEY")
    assert asked("http://cloud.example/v1")


def test_split_thought_leaves_an_answer_without_thought_alone():
    answer = read_answer(json.dumps(completion(PAIRS)).encode())
    assert split_thought(answer) is answer and not answer.thought
