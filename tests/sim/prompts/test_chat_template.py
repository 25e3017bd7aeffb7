"""A prompt is the same on every day, and what it is made of is in the fingerprint that every cache uses."""

from __future__ import annotations

import datetime
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untether.clients.device.worker import Models
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.encoding import encode_prompt
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.stores.adapter_cache import content_key
from untether.server import generator as generators
from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.prompts import chat_template

DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}\n'
    "{%- for m in messages %}{{ m.role }} {{ date_string }} {{ m.content }} {% endfor %}"
    "{%- if add_generation_prompt %}{{ 'device' }}{% if enable_thinking is not defined or enable_thinking %} think"
    "{% endif %}{% endif %}"
)
WORDS = ["[pad]", "[end]", "[stop]", "[unk]", "user", "system", "device", "think", "26", "Jul", "2024", "rate", "this"]
TURN = [{"role": "user", "content": "rate this"}]


def tokenizer(template: str = DATED, words: tuple[str, ...] = (), end: str = "[end]") -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*WORDS, *words])}, unk_token="[unk]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[pad]", unk_token="[unk]", eos_token=end)
    made.chat_template = template
    return made


def save(folder, made: PreTrainedTokenizerFast | None = None, ends: list[int] | int = 1):
    """A tiny random model with this tokenizer, as a folder."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=ends, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    import torch

    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (made or tokenizer()).save_pretrained(folder)
    return folder


def test_a_prompt_is_the_same_tomorrow(tmp_path, monkeypatch):
    """A template that prints the day, read on two different days."""
    from untether.server.generator.local_model import LocalModelGenerator

    folder, turn, told, plain = save(tmp_path / "model"), [{"role": "user", "content": "rate this"}], [], []
    for day in (datetime.datetime(2026, 11, 27), datetime.datetime(2031, 1, 2)):
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", stopped(day))
        base, cloud = FrozenBase.load(str(folder), "float32", "cpu"), LocalModelGenerator(str(folder), device="cpu")
        written = encode_prompt(base.tokenizer, "rate this")
        told.append((written, base.fingerprint, cloud.prompt(turn), cloud.fingerprint))
        plain.append(base.tokenizer.apply_chat_template(turn, tokenize=False))
    assert told[0] == told[1] and "user 26 Jul 2024 rate this" in told[0][2] and "think" not in told[0][2]
    assert plain[0] != plain[1] and "02 Jan 2031" in plain[1], "the clock was not moved"


def stopped(day):
    """A clock that stands at the midnight of a day."""

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(day.year, day.month, day.day)

    return Stopped


@settings(max_examples=8)  # each compiles two templates
@given(st.lists(st.sampled_from([*"aAbBdHIjmMpSUwWxXyY", "-d", "-m", "%", "-I"]), max_size=6), st.dates())
def test_the_fixed_day_is_written_as_the_clock_would_write_it(directives, day):
    """Transformers' own `strftime_now`, with its clock set to that day's midnight, is the oracle."""
    wanted = " ".join(["at", *(f"%{letter}" for letter in directives)])
    told, named = f"strftime_now({json.dumps(wanted)})", "{{ strftime_now(format='%Y') }}"
    template = f"  {{% if true %}}{{{{ {told} }}}}{{% endif %}}\n{named}"

    made = tokenizer(template)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", stopped(day))
        plain = made.apply_chat_template(TURN, tokenize=False)
    chat_template.tell(made, {"strftime_now": day.isoformat()})
    assert chat_template.render(made, TURN) == plain


def test_an_experiment_says_what_the_template_prints():
    made = tokenizer()
    assert chat_template.render(made, TURN) == "user 26 Jul 2024 rate this device"
    assert chat_template.arguments(made) == {"enable_thinking": False, "strftime_now": "2024-07-26"}
    chat_template.tell(made, {"date_string": "today", "enable_thinking": True})
    assert chat_template.render(made, TURN) == "user today rate this device think"
    chat_template.tell(made, {"strftime_now": "2030-12-01", "system_prompt": "this"})
    assert chat_template.render(made, TURN) == "system 01 Dec 2030 this user 01 Dec 2030 rate this device"
    strict = tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + DATED)
    chat_template.tell(strict, {"system_prompt": "this"})
    assert chat_template.render(strict, TURN) == "user 26 Jul 2024 this\n\nrate this device"
    bare = tokenizer(None)
    chat_template.tell(bare, {"system_prompt": "this"})
    assert encode_prompt(bare, "rate") == [WORDS.index("this"), WORDS.index("rate")]


def test_a_template_without_switches_is_given_nothing():
    made = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinkings }}")
    assert chat_template.arguments(made) == {}


def changed(folder, way: str):
    """The model's folder with one thing changed."""
    config, generation = folder / "config.json", folder / "generation_config.json"
    if way == "template":
        save(folder, tokenizer(DATED + " "))
    elif way == "tokenizer":
        save(folder, tokenizer(words=("more",)))
    elif way == "end of the tokenizer":
        save(folder, tokenizer(end="[stop]"))
    elif way == "end of the model":
        generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": [1, 2]}))
    elif way == "weights":
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    return folder


JOB = TrainJob("key", [Example([4, 11], [12, 1])])


def keys(folder, **template_args) -> tuple[str, str, str]:
    """What caches know a model by: the device's, its adapter's, and the cloud's of the same files."""
    base = Models().base(str(folder), "float32", "cpu", template_args)
    local = generators.create("transformers", {"model": str(folder), "device": "cpu", "template_args": template_args})
    return base.fingerprint, content_key(base, JOB), local.fingerprint


@pytest.mark.parametrize("way", ["template", "tokenizer", "end of the tokenizer", "end of the model", "weights"])
def test_the_fingerprint_changes_with_whatever_a_prompt_or_an_answer_is_made_of(tmp_path, way):
    before = keys(save(tmp_path / "model"))
    after = keys(changed(save(tmp_path / "other"), way))
    assert not set(before) & set(after)


def test_the_fingerprint_changes_with_the_arguments_and_not_with_the_place(tmp_path):
    folder = save(tmp_path / "model")
    plain = keys(folder)
    assert keys(shutil.copytree(folder, tmp_path / "elsewhere" / "under another name")) == plain
    assert keys(folder, enable_thinking=False, strftime_now=chat_template.DATE) == plain, "the defaults, named"
    others = ({"enable_thinking": True}, {"date_string": "x"}, {"strftime_now": "2030-01-01"}, {"system_prompt": "x"})
    for other in others:
        assert not set(plain) & set(keys(folder, **other)), other


def test_reading_in_batches_changes_no_fingerprint():
    made = tokenizer()
    before = chat_template.fingerprint(made, [1])
    made(["rate", "rate this"], padding=True, truncation=True, max_length=4)
    assert chat_template.fingerprint(made, [1]) == before != chat_template.fingerprint(made, [1, 2])


def test_what_environment_json_is_told(tmp_path):
    folder = save(tmp_path / "model", ends=[1, 2])
    base = FrozenBase.load(str(folder), "float32", "cpu", template_args={"date_string": "x"})
    facts = base.written
    assert facts["template"] == DATED and facts["end_tokens"] == ["[end]", "[stop]"] and facts["end_ids"] == [1, 2]
    assert facts["template_args"] == {"date_string": "x", "enable_thinking": False, "strftime_now": "2024-07-26"}
    assert facts["special_tokens"]["eos_token"] == "[end]" and str(tmp_path) not in json.dumps(facts)


def test_the_embedded_models_prompts_are_its_templates_own():
    from untether.clients.base_model import FOLDER

    made = AutoTokenizer.from_pretrained(FOLDER)
    text = "Generate a headline for the following article: x"
    plain = made.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(made, text) == list(plain) and chat_template.arguments(made) == {}


ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": True, "more": {"deep": [1, 2.5, "x"]}}


def test_arguments_survive_toml(tmp_path):
    experiment = Experiment.model_validate({
        "model": {"template_args": ARGUMENTS},
        "cloud": {"provider": "transformers", "model": "m", "template_args": ARGUMENTS},
    })  # fmt: skip
    for comments in (False, True):
        (tmp_path / "e.toml").write_text(experiment.to_toml(comments))
        assert Experiment.read(tmp_path / "e.toml") == experiment
    for text in (json.dumps({"enable_thinking": True}), "{enable_thinking = true}"):
        assert Experiment.read(None, {"model.template_args": text}).model.template_args == {"enable_thinking": True}
    alone = Experiment.read(None, {"model.template_args.date_string": "26 Jul 2024"})
    assert alone.model.template_args == {"date_string": "26 Jul 2024"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokenize": False}, "'tokenize' cannot be set"),
        ({"a b": 1}, "'a b' cannot be set"),
        ({"strftime_now": "yesterday"}, "strftime_now = 'yesterday': give the day"),
        ({"strftime_now": 3}, "strftime_now = 3: give the day"),
        ({"system_prompt": 3}, "system_prompt = 3: give the system turn's text"),
        ({"x": None}, "x = None: give text"),
        ({"x": [float("nan")]}, "give text, a number"),
    ],
)
def test_arguments_that_are_none_are_the_users_mistake(given, said):
    with pytest.raises(UserError, match=rf"model\.template_args: .*{said}"):
        Experiment.build({"model": {"template_args": given}}, None, "it")
    with pytest.raises(UserError, match=f"template_args.*{said}"):
        generators.create("transformers", {"model": "m", "template_args": given})


def test_only_a_local_cloud_has_a_template():
    with pytest.raises(UserError, match='template_args is for provider = "transformers"'):
        Experiment.build({"cloud": {"template_args": {"enable_thinking": True}}}, None, "it")
