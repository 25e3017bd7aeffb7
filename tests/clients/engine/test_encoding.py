from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from untether.clients.engine.encoding import decode_answer, encode_answer, encode_prompt, truncate_prompt
from untether.sim.core.errors import UserError

WORDS = ["[pad]", "[end]", "[bos]", "[user]", "[device]", "rate", "this", "film", "drama", "\n", "[unk]"]
TEMPLATE = "{% for m in messages %}[user] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[device]{% endif %}"


def tokenizer(template: str | None = None, **special) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[unk]"))
    model.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[pad]", unk_token="[unk]", **special)
    made.chat_template = template
    return made


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split(" ")]


def test_prompt_follows_the_chat_template():
    made = tokenizer(TEMPLATE, eos_token="[end]", additional_special_tokens=["[user]", "[device]"])
    assert encode_prompt(made, "rate this film") == ids("[user] rate this film [device]")


def test_prompt_without_a_template_ends_with_a_line_break():
    assert encode_prompt(tokenizer(eos_token="[end]"), "rate this ") == ids("rate this \n")


def test_answer_ends_and_comes_back():
    made = tokenizer(eos_token="[end]")
    assert encode_answer(made, "drama film") == ids("drama film [end]")
    assert decode_answer(made, encode_answer(made, "drama film")) == "drama film"


def test_a_tokenizer_without_an_end_is_the_users_mistake():
    with pytest.raises(UserError, match="end-of-sequence"):
        encode_answer(tokenizer(), "drama")


def test_truncation_keeps_head_and_tail():
    assert truncate_prompt(range(10), 8) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert truncate_prompt(range(10), 10) == list(range(10))
    assert truncate_prompt(range(10), 1) == [0]


@given(st.integers(1, 60), st.integers(1, 60))
def test_truncation_never_exceeds_the_limit_or_reorders(length, limit):
    kept = truncate_prompt(range(length), limit)
    assert len(kept) == min(length, limit)
    assert kept == sorted(set(kept))
