"""llama.cpp's server as a generator, on a tiny file: what is about serving and not about language."""

import json
import urllib.error
import urllib.request

import psutil
import pytest

pytest.importorskip("gguf", reason="the package gguf writes the file that is served")
pytest.importorskip("xllamacpp", reason="the package xllamacpp is the llama.cpp that is served with")

from tests.gguf_files import original, write
from untether.server.background import start_background
from untether.server.generator import GenerationRequest, create
from untether.server.generator.llama_cpp import LlamaCppGenerator, ServerDied
from untether.sim.core.errors import UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import build_samples_request, parse_request, parse_samples, response_format


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    write(path, original("llama"), split="gpt-2")
    return path


@pytest.fixture(scope="module")
def generator(file):
    made = LlamaCppGenerator(str(file), context=512, slots=2, threads=1)
    yield made
    made.close()


def samples_request(items: int = 3, chars: int = 40) -> tuple[dict, ...]:
    history = [Interaction(f"i{n}", "LaMP_4", f"{n} " + "word " * (chars // 5), f"Headline {n}", None, "query")
               for n in range(items)]  # fmt: skip
    return build_samples_request(get_task("LaMP_4"), history, 2).messages


def test_an_answer_comes_with_its_tokens_and_the_same_seed_writes_the_same(generator):
    request = GenerationRequest(({"role": "user", "content": "Write a word."},), seed=3, max_tokens=8)
    first, again = generator.generate([request, request])
    assert first.text == again.text and 0 < first.tokens_out <= 8 and first.tokens_in > 3 and not first.note
    other = GenerationRequest(request.messages, seed=4, max_tokens=8)
    assert generator.generate([other])[0].text != first.text


def test_json_is_kept_to_by_grammar(generator):
    schema = response_format(("left", "right"))["json_schema"]["schema"]
    schema["properties"]["samples"] |= {"minItems": 1, "maxItems": 1}
    schema["properties"]["samples"]["items"]["properties"]["input"] |= {"maxLength": 8}
    for seed in range(3):
        request = GenerationRequest(samples_request(), seed=seed, temperature=1.0, max_tokens=400, schema=schema)
        pairs, problems = parse_samples(generator.generate([request])[0].text)
        assert not problems and pairs[0].output in ("left", "right")


def test_what_does_not_fit_the_context_is_left_out_and_said(generator):
    messages = samples_request(items=16, chars=400)
    request = GenerationRequest(messages, seed=1, max_tokens=64)
    done = generator.generate([request])[0]
    assert done.tokens_in <= 512 - 64
    assert done.note.startswith("context=512 items_left_out_or_cut=")
    fitted, _ = generator._fitting(request)
    left = parse_request(fitted)
    whole = parse_request(messages)
    shown, all_of_them = ([item.output for item in asked.items] for asked in (left, whole))
    assert shown and shown == all_of_them[-len(shown):]
    assert (left.count, left.task) == (whole.count, whole.task)


def test_a_chat_that_is_no_request_of_ours_is_refused_as_too_long(generator):
    from untether.server.generator import PromptTooLong

    with pytest.raises(PromptTooLong, match="maximum context length is 512 tokens"):
        generator.generate([GenerationRequest(({"role": "user", "content": "word " * 600},), seed=1)])


def test_a_server_that_dies_is_started_again_once(file):
    made = LlamaCppGenerator(str(file), context=512, slots=1, threads=1)
    try:
        request = GenerationRequest(({"role": "user", "content": "Write a word."},), seed=3, max_tokens=4)
        before, first = made.generate([request])[0].text, made.pid
        psutil.Process(first).kill()
        assert made.generate([request])[0].text == before and made.pid != first
        psutil.Process(made.pid).kill()
        with pytest.raises(ServerDied, match="ended a second time .exit code -9"):
            made.generate([request])
    finally:
        made.close()


def test_a_limit_follows_the_measured_speed(generator):
    reading, writing = generator.speed
    one = generator.limit_s(max_tokens=100, waiting=1)
    assert one > 412 / reading + 100 / writing
    assert generator.limit_s(max_tokens=100, waiting=8) == pytest.approx(4 * one)


def test_a_gateway_serves_it_and_nothing_is_left_of_it(file):
    options = {"model": str(file), "context": 512, "slots": 2, "threads": 1}
    with start_background("llama_cpp", options, load=(64, 4), start_timeout_s=240) as gateway:
        family = psutil.Process(gateway.pid).children(recursive=True)
        assert gateway.limit_s > 0 and gateway.model == "tiny" and family
        body = {"model": "tiny", "seed": 1, "max_tokens": 5, "messages": samples_request(items=30, chars=400)}
        request = urllib.request.Request(f"{gateway.base_url}/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            assert "items_left_out_or_cut" in json.load(answer)["note"]
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_what_cannot_be_served_is_said_in_one_sentence(tmp_path, file, monkeypatch):
    monkeypatch.setenv("UNTETHER_CACHE", str(tmp_path))
    (tmp_path / "page.gguf").write_text("<html>")
    cases = {"smollm2-135m": "untether model fetch smollm2-135m", "smollm": "Did you mean `smollm2-135m`?",
             str(tmp_path / "page.gguf"): "is no GGUF file: it begins with b'<htm'"}  # fmt: skip
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-20_000])
    cases[str(tmp_path / "cut.gguf")] = "llama.cpp does not serve"
    for model, says in cases.items():
        with pytest.raises(UserError) as refused:
            create("llama_cpp", {"model": model})
        assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("changes", "says"), [
    ({"cloud.provider": "llama_cpp"}, "needs cloud.model, a name of `untether model list`"),
    ({"cloud.context": "512"}, 'context is for provider = "llama_cpp", and this is "world"'),
    ({"cloud.dtype": "float32"}, 'dtype is for provider = "transformers"'),
])  # fmt: skip
def test_an_experiment_says_what_is_missing_or_of_no_use(changes, says):
    with pytest.raises(UserError) as refused:
        Experiment.read(None, changes)
    assert says in str(refused.value)
