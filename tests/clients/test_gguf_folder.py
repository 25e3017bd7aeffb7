"""Conversion of GGUF files, against the model that a file was made of, transformers' own reading, and llama.cpp."""

import json
import math
import shutil
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gguf_files import KINDS, SPLITS, original, write
from untether.clients.base_model import FOLDER, resolve
from untether.clients.base_model import gguf_folder as conversion
from untether.clients.base_model.gguf_folder import convert, folder_of
from untether.clients.engine.base import FrozenBase
from untether.sim.core.errors import ResumableStop, UserError

gguf = pytest.importorskip("gguf", reason="the package gguf reads and writes the files that are converted")

TEXTS = (
    "The mayor's new bridge opens in May 2024, for 1,234,567 people.", "  two  spaces\n\nlines\t and tabs ",
    "½ ² ４ ٣ 12", "don't WON'T I'll they've", "naïve café 東京 😀 <|end|> <b>", "",
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory):
    """(the model, its GGUF file, the folder made of that)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = original(request.param)
    write(folder / "model.gguf", model, split=SPLITS[request.param])
    convert(folder / "model.gguf", folder / "made")
    return model, folder / "model.gguf", folder / "made"


def test_weights_configuration_and_answers_are_the_models_own(converted):
    model, _, folder = converted
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(made) is type(model)
    theirs = model.state_dict()
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_transformers_reads_the_same_weights_from_the_file(converted):
    model, file, folder = converted
    if model.config.model_type == "qwen3":
        pytest.skip("transformers takes every Qwen3's heads to be 128 wide, whatever the file says")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_texts_are_split_as_the_models_tokenizer_splits_them(converted):
    model, _, folder = converted
    if model.config.model_type != "llama":
        pytest.skip("the embedded model's own tokenizer splits as GPT-2's")
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(FOLDER)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.eos_token_id == theirs.eos_token_id


def test_llama_cpp_agrees_on_tokens_probabilities_perplexity_and_greedy_text(converted):
    xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp (llama.cpp) is the oracle here")
    model, file, folder = converted
    told = xllamacpp.CommonParams()
    told.model.path, told.n_ctx, told.n_parallel, told.port = str(file), 512, 1, 0
    told.warmup, told.verbosity = False, 0
    told.cpuparams.n_threads = told.cpuparams_batch.n_threads = 1
    told.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for kept in ("cache_type_k", "cache_type_v"):
        setattr(told, kept, xllamacpp.ggml_type.GGML_TYPE_F32)
    server = xllamacpp.Server(told)

    def ask(path, **body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ask("/tokenize", content=text, parse_special=True)["tokens"] == tokenizer(text)["input_ids"], text
    ids = tokenizer("Which of these would the user read next? " + TEXTS[0])["input_ids"]
    with torch.inference_mode():
        logits = made(torch.tensor([ids])).logits[0].log_softmax(-1)
        greedy = made.generate(torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(ids):]
    surprise, looked_at = [0.0, 0.0], 0
    for place in range(1, len(ids)):
        found = ask("/completion", prompt=ids[:place], n_predict=1, n_probs=len(logits[0]), temperature=0)
        if "completion_probabilities" not in found:  # it would end here: there is no token to tell about
            continue
        looked_at += 1
        listed = {row["id"]: row["logprob"] for row in found["completion_probabilities"][0]["top_logprobs"]}
        theirs = torch.tensor([listed.get(token, -math.inf) for token in range(len(logits[0]))])
        shown = theirs > -15  # what is all but impossible is rounded away
        torch.testing.assert_close(theirs[shown], logits[place - 1][shown], rtol=0, atol=2e-3)
        surprise[0] -= listed[ids[place]]
        surprise[1] -= float(logits[place - 1][ids[place]])
    assert looked_at > len(ids) / 2
    assert math.exp(surprise[0] / looked_at) == pytest.approx(math.exp(surprise[1] / looked_at), rel=1e-3)
    answer = ask("/completion", prompt=ids, n_predict=12, temperature=0, ignore_eos=True, return_tokens=True)
    assert answer["tokens"] == greedy.tolist()


def test_a_quantised_file_becomes_a_base_of_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("UNTETHER_CACHE", str(tmp_path / "cache"))
    model = original("llama")
    write(tmp_path / "small.gguf", model, split="smollm", quantised=True)
    folder = resolve(str(tmp_path / "small.gguf"))
    base = FrozenBase.load(folder, dtype="float32")
    ids, places = torch.arange(5, 45)[None], torch.arange(40)
    with torch.inference_mode():
        near, exact = base.logits_at(places, ids).log_softmax(-1), model(ids).logits[0].log_softmax(-1)
    divergence = (exact.exp() * (exact - near)).sum(-1)
    assert 0 < divergence.mean() < 0.02  # 8 bits a weight
    assert base.tokenizer.tokenize("a 12½") == ["a", "Ġ", "1", "2", "Â", "½"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(tmp_path / "small.gguf", moved)
    monkeypatch.setattr(conversion, "convert", None)  # what is converted is not converted again, wherever the file lies
    assert resolve(str(moved)) == folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A valid file."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write(path, original("qwen3"), split="qwen2")
    return path


def test_what_is_no_whole_gguf_file_is_refused(tmp_path, small):
    whole = small.read_bytes()
    for content, says in ((b"<html>not found</html>", "is no GGUF file: it begins with b'<htm'"), (b"", "is no GGUF"),
                          (whole[:200], "broken or cut short"), (whole[:-5000], "broken or cut short")):  # fmt: skip
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match="bad.gguf") as refused:
            folder_of(tmp_path / "bad.gguf", tmp_path / "made")
        assert says in str(refused.value) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.gguf"]
    with pytest.raises(UserError, match="no such GGUF file"):
        folder_of(tmp_path / "none.gguf")


@pytest.mark.parametrize(("changes", "says"), [
    ({"split": "deepseek-llm"}, "texts split as `deepseek-llm`"),
    ({"split": "qwen2", "facts": [("qwen3.rope.scaling.type", "yarn")]}, "rope scaling `yarn`"),
    ({"split": "qwen2", "rename": lambda name: name.replace("ffn_up", "ffn_upper")}, "here, blk.0.ffn_upper"),
    ({"split": "qwen2", "rename": lambda name: name.replace("blk.1.", "blk.2.")}, "broken: model.layers.1"),
])  # fmt: skip
def test_what_would_be_nearly_right_is_refused(tmp_path, changes, says):
    write(tmp_path / "odd.gguf", original("qwen3"), **changes)
    with pytest.raises(UserError, match="odd.gguf") as refused:
        folder_of(tmp_path / "odd.gguf", tmp_path / "made")
    assert says in str(refused.value)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture `mamba`, which is not converted .* llama, qwen2, qwen3"):
        folder_of(tmp_path / "other.gguf", tmp_path / "made")


def test_a_full_disk_is_a_stop_and_leaves_nothing(tmp_path, small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "convert", full)
    with pytest.raises(ResumableStop, match="no space to convert"):
        folder_of(small, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_fetched_is_named_with_the_command_that_does(tmp_path, monkeypatch):
    monkeypatch.setenv("UNTETHER_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="Fetch it with: untether model fetch smollm2-135m"):
        resolve("smollm2-135m")
