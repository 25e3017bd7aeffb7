"""Text to token ids and back, in one place, so that training, decoding and scoring always agree on a prompt.

A prompt is one user message in the tokenizer's chat template, generation prompt included, or the text and a line break
where the tokenizer has no template; the template's arguments are set by `sim.prompts.chat_template`. An answer is its
text and the end-of-sequence token, which an adapter learns to write: generation stops there.
"""

from __future__ import annotations

from collections.abc import Sequence

from untether.sim.core.errors import UserError
from untether.sim.prompts.chat_template import encode, encode_text, turn_end

_HEAD_SHARE = 0.75
"""Instructions come first and the generation prompt last; of a prompt that is too long the middle says least."""


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Returns the token ids of a prompt: chat template with generation prompt, or [bos] + text + newline without one.

    A control token that the text spells stays text, here and in answers.
    """
    return encode(tokenizer, [{"role": "user", "content": text}])


def encode_answer(tokenizer, text: str) -> list[int]:
    """Returns the token ids of an answer: the text without special tokens, then the token that ends a turn."""
    end = turn_end(tokenizer)
    if end is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, so an answer could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    return [*encode_text(tokenizer, text), end]


def decode_answer(tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of generated ids, special tokens skipped and white space at both ends removed."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def is_cut(prompt_ids: Sequence[int], more: int, context: int) -> bool:
    """Returns whether a prompt and `more` tokens do not fit into the context, so that something of them is cut."""
    return len(prompt_ids) + more > context


def truncate_prompt(ids: Sequence[int], limit: int) -> list[int]:
    """Cuts token ids to at most `limit`, leaving out the middle: three quarters of the limit are head, one is tail.

    The head holds the instruction, the tail the end of the content and the template's turn markers.
    """
    if limit < 1:
        raise ValueError(f"a prompt needs at least one token, not {limit}")
    if len(ids) <= limit:
        return list(ids)
    head = max(1, int(limit * _HEAD_SHARE))
    tail = limit - head
    return [*ids[:head], *ids[len(ids) - tail :]]
