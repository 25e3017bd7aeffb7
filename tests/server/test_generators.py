"""Generators: what they write depends on the request alone, and they say honestly who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untether.clients.cloud.client import CloudClient
from untether.clients.device.augmentation import answer_request, samples_requests
from untether.server import generator as generators
from untether.server.background import start_background
from untether.server.generator import Completion, GenerationRequest, PromptTooLong
from untether.server.generator.local_model import LocalModelGenerator
from untether.sim.core.errors import UserError
from untether.sim.core.kinds import GENERATORS
from untether.sim.core.records import Interaction
from untether.sim.core.text import plain
from untether.sim.experiment.sections import CloudSection
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import NotARequest, build_answer_request, build_samples_request, parse_samples

recombine = generators.create("recombine")


def history(task: str, contents) -> list[Interaction]:
    form = get_task(task).item_form
    return [Interaction(f"i{n}", task, text, output, None, form) for n, (text, output) in enumerate(contents)]


def ask(task: str, contents, count: int = 5, seed: int = 0, max_tokens: int = 5000):
    messages = build_samples_request(get_task(task), history(task, contents), count).messages
    [done] = recombine.generate([GenerationRequest(messages, seed, max_tokens=max_tokens)])
    return parse_samples(done.text).pairs


def answer(task: str, contents, query: str) -> str:
    messages = build_answer_request(get_task(task), history(task, contents), query).messages
    return recombine.generate([GenerationRequest(messages, 0)])[0].text


def test_the_registry_refuses_a_taken_name_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="registered already"):
        GENERATORS.register("recombine", lambda: recombine)
    with pytest.raises(UserError, match="unknown generator `gpt`.*world.*recombine.*transformers"):
        generators.create("gpt")
    with pytest.raises(UserError, match="'size'.*model"):
        generators.create("transformers", {"size": 7})
    with pytest.raises(UserError, match="needs the option 'model'"):
        generators.create("transformers")
    with pytest.raises(UserError, match="'colour'.*knowledge"):
        generators.create("world", {"colour": "red"})


NEWS = [
    ("The team won. The coach smiled. Fans sang all night.", "sports"),
    ("A goal came late. The keeper slipped.", "sports"),
    ("The bill passed. Senators argued for hours. A veto looms.", "politics"),
    ("Voters queued early. The count took days.", "politics"),
]


def test_a_label_keeps_its_own_sentences():
    pairs = ask("LaMP_2N", NEWS, count=8)
    assert len(pairs) == 8 and {pair.output for pair in pairs} == {"sports", "politics"}
    for pair in pairs:
        own = " ".join(text for text, label in NEWS if label == pair.output)
        assert all(sentence in own for sentence in pair.input.rstrip(".").split(". "))
        assert tuple(pair) not in NEWS


def test_a_headline_keeps_a_part_of_its_article():
    articles = [("One here. Two here. Three here. Four here.", "Numbers"), ("Just a single sentence of words", "Words")]
    pairs = ask("LaMP_4", articles, count=6)
    assert len(pairs) == 6
    for pair in pairs:
        source = next(text for text, title in articles if title == pair.output)
        assert set(pair.input.split()) < set(source.split())


def test_a_citation_is_asked_in_the_querys_form():
    for pair in ask("LaMP_1", [("abstract a", "Title A"), ("abstract b", "Title B"), ("abstract c", "Title C")], 6):
        left, right = pair.input.split(" [2]: ")
        fitting = right if pair.output == "[2]" else left.split(" [1]: ")[1]
        assert fitting.strip('"') in {"Title A", "Title B", "Title C"} and pair.input.startswith('"Title ')
        assert get_task("LaMP_1").prompt(pair.input).startswith("For an author who has written the paper")


def test_a_tweet_is_paraphrased_into_the_users_own_words():
    tweets = [("OMG the show", "was SO good!!! Cannot wait. #fun"), ("going home", "now. Bye @friend!")]
    pairs = ask("LaMP_7", tweets, 4)
    assert pairs
    for pair in pairs:
        assert pair.input == pair.input.lower() and "#" not in pair.input and "@" not in pair.input
        assert set(pair.output.split()) <= set(" ".join(a + " " + b for a, b in tweets).split())


def test_answers_without_a_model():
    assert answer("LaMP_2N", NEWS, "The coach of the team slipped.") == "sports"
    assert answer("LaMP_4", [("cats and dogs", "Pets"), ("stocks and bonds", "Money")], "bonds fell") == "Money"
    assert answer("LaMP_7", [("going home", "now. Bye!")], "I am leaving") == "I am leaving"
    titles = [("abstract", "Deep graph networks"), ("abstract", "Learning on graphs")]
    query = '"New paper" [1]: "Roman coins" [2]: "Graph networks at scale"'
    assert answer("LaMP_1", titles, query) == "[2]"
    assert answer("LaMP_3", [], "great") == "1"


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]),
    st.lists(st.tuples(st.text(max_size=40), st.text(min_size=1, max_size=12)), max_size=5),
    st.integers(0, 2**31),
)
def test_recombination_is_deterministic_and_never_copies(task, contents, seed):
    contents = [(plain(a), plain(b).strip() or "x") for a, b in contents]  # a reader drops what is no text
    pairs = ask(task, contents, seed=seed)
    assert pairs == ask(task, contents, seed=seed)
    assert len(set(pairs)) == len(pairs) <= 5
    assert not {(a.strip(), b.strip()) for a, b in contents} & set(map(tuple, pairs)) or task in ("LaMP_1", "LaMP_7")


def test_seeds_give_other_pairs_and_foreign_messages_are_refused():
    assert ask("LaMP_2N", NEWS, seed=1) != ask("LaMP_2N", NEWS, seed=2)
    with pytest.raises(NotARequest):
        recombine.generate([GenerationRequest(({"role": "user", "content": "hi"},), 0)])


def test_the_world_hands_foreign_text_to_recombine_and_says_so():
    messages = build_samples_request(get_task("LaMP_2N"), history("LaMP_2N", NEWS), 4).messages
    [done] = generators.create("world").generate([GenerationRequest(messages, 3)])
    [same] = recombine.generate([GenerationRequest(messages, 3)])
    assert done.model == "recombine" and done.text == same.text


TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


def save_model(path: Path, context: int = 64) -> str:
    """A random Llama of 60 words, saved as anyone saves a model."""
    words = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", *[f"w{n}" for n in range(54)]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=context, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def local(model_path):
    return LocalModelGenerator(model_path, threads=1)


def chat(text: str, seed: int = 0, **more) -> GenerationRequest:
    return GenerationRequest(({"role": "user", "content": text},), seed, **{"max_tokens": 12, **more})


def test_a_row_is_written_the_same_alone_and_in_any_batch(local):
    batch = [
        chat("w1 w2 w3", 1),
        chat("w4", 2),
        chat("w9 w9 w9 w9 w9 w9", 3, temperature=0.0),
        chat("w5", 4, top_p=0.5),
    ]
    together = local.generate(batch)
    assert together == [local.generate([request])[0] for request in batch]
    assert together == local.generate(batch[::-1])[::-1]
    assert local.generate([chat("w4", 7)]) != [together[1]]


def test_tokens_are_the_tokenizers_own(local):
    [done] = local.generate([chat("w1 w2 w3")])
    assert done.tokens_in == 5  # <user> w1 w2 w3 <assistant>
    assert done.finish_reason in ("stop", "length") and done.tokens_out <= 12
    [short] = local.generate([chat("w1 w2 w3", max_tokens=2)])
    assert short.tokens_out <= 2 and done.text.startswith(short.text)


def test_temperature_zero_is_the_models_own_greedy(local, model_path):
    model = LlamaForCausalLM.from_pretrained(model_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    ids = tokenizer("<user> w7 w8 <assistant>", return_tensors="pt", add_special_tokens=False)
    out = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False, max_new_tokens=12)
    expected = tokenizer.decode(out[0, 4:], skip_special_tokens=True)
    assert local.generate([chat("w7 w8", temperature=0.0)])[0].text == expected


def test_sampling_follows_the_models_distribution(local, model_path):
    """First tokens over many seeds against the softmax itself: total variation within what 3000 draws allow."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    ids = tokenizer("<user> w7 <assistant>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    wanted = (model(ids).logits[0, -1].float() / 0.05).softmax(0).detach()
    counts = torch.zeros(60)
    for start in range(0, 3000, 500):
        for done in local.generate(
            [chat("w7", seed, temperature=0.05, max_tokens=1) for seed in range(start, start + 500)]
        ):
            token = 1 if done.finish_reason == "stop" else tokenizer.convert_tokens_to_ids(done.text or "<pad>")
            counts[token] += 1
    special = [3, 4, 5]  # decoded like ordinary words by this tokenizer
    assert wanted.max() < 0.9 and wanted[special].sum() < 0.5
    assert 0.5 * (counts / 3000 - wanted).abs().sum() < 0.06


def test_a_prompt_without_room_is_refused_and_another_is_cut(local):
    with pytest.raises(PromptTooLong, match="64"):
        local.generate([chat(" ".join(["w1"] * 70))])
    [cut] = local.generate([chat(" ".join(["w1"] * 58), max_tokens=50)])
    assert cut.tokens_in == 60 and cut.tokens_out <= 4


def test_the_fingerprint_follows_the_weights(local, model_path, tmp_path):
    assert LocalModelGenerator(model_path).fingerprint == local.fingerprint and local.model_id == "tiny"
    model = LlamaForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1  # any one of them
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(model_path).save_pretrained(tmp_path)
    assert LocalModelGenerator(str(tmp_path)).fingerprint != local.fingerprint


def test_a_template_without_a_system_turn_gets_it_in_the_users(model_path):
    strict = LocalModelGenerator(model_path, threads=1)
    strict._tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    text = strict.prompt([{"role": "system", "content": "w1"}, {"role": "user", "content": [{"text": "w2"}]}])
    assert text == "<user> w1\n\nw2 <assistant>"
    strict._tokenizer.chat_template = None
    assert strict.prompt([{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]) == "w1\n\nw2\n\n"


def test_a_local_model_is_asked_like_any_endpoint(tmp_path):
    """Through the gateway: no schema (asked plainly from then on), nonsense drawn anew and given up, real counts."""
    path = save_model(tmp_path / "roomy", context=2048)
    items = history("LaMP_4", [("w1 w2", "w3")])
    task = get_task("LaMP_4")
    names = {"request_id": "r", "device_id": "d", "seed": 0, "round": 0}
    requests = [*samples_requests(task, items, 2, **names), answer_request(task, items, "w4 w5", "q", **names)]
    with start_background("transformers", {"model": path, "threads": 1}) as gateway:
        settings = CloudSection(provider="transformers", model=path, max_tokens=16, max_retries=1, concurrency=2)
        client = CloudClient(settings, base_url=gateway.base_url, model=gateway.model, api_key="")
        samples, text = client.ask_sync(requests)
    assert gateway.model == "roomy" and client.left_out == {"response_format"}
    assert [(a.outcome, a.draw) for a in samples.attempts] == [("rejected", 0), ("malformed", 0), ("malformed", 1)]
    assert text.ok and text.attempts[0].tokens_out <= 16 and not text.attempts[0].tokens_estimated
    words = sum(len(message["content"].split()) for message in requests[1].messages)
    assert text.attempts[0].tokens_in == words + 3  # <system>, <user>, <assistant>


@pytest.mark.parametrize("name", ["/nowhere/at/all", "."])
def test_a_model_that_does_not_load_is_the_users_mistake(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cloud.model"):
        generators.create("transformers", {"model": name})


def test_completions_are_plain_values():
    assert Completion("a", 1, 2) == Completion("a", 1, 2, "stop", None, None)
