"""The endpoint speaks the protocol of OpenAI, to the real client, from a process that never outlives its owner."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
from fastapi.testclient import TestClient

from untether.clients.cloud.client import CloudClient
from untether.clients.device.augmentation import samples_from, samples_requests
from untether.server.batching import Batcher
from untether.server.gateway import create_app, serve, start_background
from untether.server.generator import Completion, GenerationRequest, create
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment.sections import CloudSection
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import build_samples_request, parse_samples

ITEMS = [Interaction(f"i{k}", "LaMP_4", f"One {k}. Two {k}. Three {k}. Four {k}.", f"title {k}") for k in range(4)]
MESSAGES = list(build_samples_request(get_task("LaMP_4"), ITEMS, 3).messages)


class Counting:
    """A batched generator that notes its batches; a request with temperature 2 breaks it."""

    name = model_id = "counting"
    fingerprint = "fp_counting"
    batched = True
    structured = False
    max_batch = 4

    def __init__(self, wait_s: float = 0.0) -> None:
        self.batches: list[int] = []
        self.wait_s = wait_s

    def generate(self, batch):
        self.batches.append(len(batch))
        time.sleep(self.wait_s)
        if any(request.temperature == 2 for request in batch):
            raise RuntimeError("this one breaks it")
        return [Completion(f"seed {request.seed}", 3, 2) for request in batch]


@pytest.fixture(scope="module")
def gateway():
    with start_background("recombine") as started:
        yield started


@pytest.fixture(scope="module")
def api(gateway):
    with openai.OpenAI(base_url=gateway.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_has_openais_shape(gateway, api):
    done = api.chat.completions.create(model=gateway.model, messages=MESSAGES, seed=5)
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-")
    assert done.system_fingerprint == gateway.fingerprint and done.choices[0].finish_reason == "stop"
    assert len(parse_samples(done.choices[0].message.content).pairs) == 3
    assert done.usage.prompt_tokens == sum(-(-len(m["content"]) // 4) for m in MESSAGES)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    again = api.chat.completions.create(model=gateway.model, messages=MESSAGES, seed=5)
    other = api.chat.completions.create(model=gateway.model, messages=MESSAGES, seed=6)
    assert again.choices == done.choices and other.choices != done.choices and again.id != done.id


def test_models_and_health(gateway, api):
    assert [model.id for model in api.models.list()] == ["recombine"]


def test_max_tokens_cuts_and_says_so(gateway, api):
    done = api.chat.completions.create(model=gateway.model, messages=MESSAGES, seed=5, max_tokens=30)
    assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 30
    assert len(done.choices[0].message.content) == 120


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"stream": True}, openai.BadRequestError, "stream"),
        ({"n": 2}, openai.BadRequestError, "n must be 1"),
        ({"model": "gpt-9"}, openai.NotFoundError, "recombine"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, openai.BadRequestError, "own requests only"),
        ({"temperature": 7}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"seed": "x"}}, openai.BadRequestError, "seed"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_a_wrong_request_gets_openais_error(gateway, api, changes, error, word):
    with pytest.raises(error, match=word):
        api.chat.completions.create(**{"model": gateway.model, "messages": MESSAGES, **changes})


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[1]", b"\xff"])
def test_a_body_that_is_no_json_object(body):
    with TestClient(create_app(create("recombine"))) as app:
        answer = app.post("/v1/chat/completions", content=body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_an_api_key_is_asked_for_where_one_is_set():
    with TestClient(create_app(create("recombine"), api_key="right")) as app:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer wröng".encode()}):
            answer = app.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert app.get("/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
        assert app.get("/health").status_code == 200


def test_client_and_gateway_end_to_end(gateway):
    cloud = CloudSection(provider="recombine")
    client = CloudClient(cloud, base_url=gateway.base_url, model=gateway.model, variant=gateway.fingerprint, api_key="")
    requests = [
        request
        for device in range(12)
        for request in samples_requests(
            get_task("LaMP_4"), ITEMS, 10, request_id=f"r{device}", device_id=f"d{device}", seed=1, round=0
        )
    ]
    replies = client.ask_sync(requests)
    assert all(reply.ok and reply.model == "recombine" and not reply.attempts[0].tokens_estimated for reply in replies)
    samples = samples_from(requests, replies)
    assert len(samples) == 12 * 10 and client.left_out == set()
    assert [s.input for s in samples] == [s.input for s in samples_from(requests, client.ask_sync(requests))]
    outputs = {item.output for item in ITEMS}
    assert all(sample.output in outputs for sample in samples)


def test_a_generator_without_structure_is_asked_plainly():
    with TestClient(create_app(Counting())) as app:
        body = {"model": "counting", "messages": MESSAGES, "response_format": {"type": "json_object"}}
        answer = app.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
        body["response_format"] = {"type": "text"}
        assert app.post("/v1/chat/completions", json=body).status_code == 200


def test_requests_that_wait_together_are_answered_together():
    counting = Counting(wait_s=0.05)

    async def ask() -> list[str]:
        batcher = Batcher(counting, max_wait_s=0.05)
        asked = [batcher.submit(GenerationRequest((), seed)) for seed in range(10)]
        done = await asyncio.gather(*asked)
        await batcher.close()
        return [completion.text for completion in done]

    assert asyncio.run(ask()) == [f"seed {seed}" for seed in range(10)]
    assert counting.batches == [4, 4, 2]


def test_a_request_that_breaks_a_batch_breaks_alone():
    async def ask() -> list[object]:
        batcher = Batcher(Counting(), max_wait_s=0.05)
        temperatures = [1, 2, 1]
        asked = [batcher.submit(GenerationRequest((), seed, t)) for seed, t in enumerate(temperatures)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.close()
        return [str(completion) if isinstance(completion, Exception) else completion.text for completion in done]

    assert asyncio.run(ask()) == ["seed 0", "this one breaks it", "seed 2"]


def test_a_generator_that_fails_is_a_server_error_and_the_endpoint_goes_on():
    with TestClient(create_app(Counting())) as app:
        body = {"model": "counting", "messages": MESSAGES, "temperature": 2}
        answer = app.post("/v1/chat/completions", json=body)
        assert answer.status_code == 500 and "this one breaks it" in answer.json()["error"]["message"]
        assert app.post("/v1/chat/completions", json={**body, "temperature": 1}).status_code == 200


def test_starting_what_cannot_start_says_why():
    with pytest.raises(UserError, match="unknown generator `oracle`.*recombine"):
        start_background("oracle")
    with pytest.raises(UserError, match="no option 'colour'"):
        start_background("recombine", {"colour": "red"})


def test_a_taken_port_is_the_users_mistake(gateway):
    port = int(gateway.base_url.split(":")[2].split("/")[0])
    with pytest.raises(UserError, match=f"127.0.0.1:{port}"):
        serve("recombine", port=port)


def test_serving_in_the_foreground_says_where_and_ends_with_an_interrupt():
    code = "from untether.server.gateway import serve; serve('recombine', port=0, api_key='k')"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        line = process.stdout.readline()
        base_url = line.split(" at ")[1].split(" ")[0]
        with openai.OpenAI(base_url=base_url, api_key="k", max_retries=8) as api:
            assert line.startswith("serving recombine at http://127.0.0.1:") and api.models.list().data
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)


def test_stop_ends_the_process():
    started = start_background("recombine")
    process = psutil.Process(started.pid)
    started.stop()
    started.stop()
    assert not started.alive() and not process.is_running()


def test_the_gateway_dies_with_its_parent():
    code = (
        "import json, sys, time; from untether.server.gateway import start_background;"
        "g = start_background('recombine');"
        "print(g.pid, flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    pid = int(parent.stdout.readline())
    orphan = psutil.Process(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    orphan.wait(timeout=20)
    assert not orphan.is_running()


def test_text_that_utf8_cannot_carry_does_not_break_an_answer():
    class Broken(Counting):
        def generate(self, batch):
            return [Completion("half \ud83d", 1, 1) for _ in batch]

    with TestClient(create_app(Broken())) as app:
        answer = app.post("/v1/chat/completions", json={"model": "counting", "messages": MESSAGES})
        assert json.loads(answer.content)["choices"][0]["message"]["content"] == "half ?"
