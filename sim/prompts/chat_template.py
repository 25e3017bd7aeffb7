"""The arguments of chat templates, so that a prompt is the same on any day and on any machine.

A template is a program of the model's maker: it may print today's date, have the model think unless told not to, or add
a system turn of its own. What it prints belongs to the experiment: the variables that it is given
(`model.template_args`, `cloud.template_args`), with thinking off and a fixed date by default, and a fingerprint of all
that turns a text into token ids and back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

from untether.sim.experiment.sections import NOW, SYSTEM

DATE = "2024-07-26"
"""What a template that asks for today's date is told (the date that Llama 3.2's own falls back on)."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables that tell a template whether the model thinks before it answers (Qwen3, SmolLM3; DeepSeek, Granite)."""

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ"


def tell(tokenizer: Any, given: Mapping[str, Any]) -> None:
    """Makes a tokenizer's template get these arguments from now on."""
    tokenizer.template_args = dict(given)


def arguments(tokenizer: Any) -> dict[str, Any]:
    """Returns all arguments of a tokenizer's template beside the messages: those set by `tell`, and defaults it needs.
    """
    given, template = dict(getattr(tokenizer, "template_args", None) or {}), template_of(tokenizer)
    for name in SWITCHES:
        if _mentions(template, name):
            given.setdefault(name, False)
    if _mentions(template, NOW):
        given.setdefault(NOW, DATE)
    return given


def template_of(tokenizer: Any) -> str:
    """Returns the template of a plain chat; empty where the tokenizer has none."""
    return tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""


def render(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> str:
    """Returns a chat as the text that the model continues.

    Where the template refuses a system turn, it goes before the user's. Without a template: the turns, a paragraph
    each, with nothing after the last.
    """
    given = arguments(tokenizer)
    system, today = given.pop(SYSTEM, ""), given.pop(NOW, DATE)
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    template = template_of(tokenizer)
    if not template:
        return "\n\n".join(turn["content"] for turn in turns)
    options = {
        "chat_template": _fixed(template, today), "tokenize": False, "add_generation_prompt": True, **given,
    }  # fmt: skip
    try:
        return tokenizer.apply_chat_template(list(turns), **options)
    except Exception:  # templates raise their own error where a system turn is not provided for
        if len(turns) < 2 or turns[0]["role"] != "system":
            raise
        merged = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return tokenizer.apply_chat_template([merged, *turns[2:]], **options)


def facts(tokenizer: Any, end_ids: Collection[int] = ()) -> dict[str, Any]:
    """Returns what `environment.json` records about prompts: template, arguments, special and end tokens, and hashes.

    It is the same wherever the model's files lie.
    """
    template = template_of(tokenizer)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return {
        "template": template, "template_sha256": _sha256(template), "template_args": arguments(tokenizer),
        "special_tokens": special, "end_tokens": [str(t) for t in tokenizer.convert_ids_to_tokens(sorted(end_ids))],
        "end_ids": sorted(end_ids), "tokenizer_sha256": _sha256(_content(tokenizer)),
    }  # fmt: skip


def fingerprint(tokenizer: Any, end_ids: Collection[int] = ()) -> str:
    """Returns the sha256 of all of `facts`: changes with the template, its arguments, the tokenizer or the end tokens.
    """
    return _sha256(json.dumps(facts(tokenizer, end_ids), sort_keys=True, ensure_ascii=True, default=str))


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", template) is not None


def _fixed(template: str, today: str) -> str:
    """The template with a `strftime_now` of its own, which hides the one of the clock.

    A function cannot be passed to a template, so its text begins with one: the day's value for every directive.
    """
    if not _mentions(template, NOW):
        return template
    day = date.fromisoformat(today)
    values = {f"%{dash}{letter}": day.strftime(f"%{dash}{letter}") for letter in _DIRECTIVES for dash in ("-", "")}
    values = {"%%": "\0", **values, "\0": "%"}
    written = "".join(f"|replace({json.dumps(given)},{json.dumps(value)})" for given, value in values.items())
    return f"{{%- macro {NOW}(format) -%}}{{{{ format{written} }}}}{{%- endmacro %}}\n{template}"


def _content(tokenizer: Any) -> str:
    """What the tokenizer makes of a text, as text: without where it lies and how a batch was last padded."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    made = json.loads(fast.to_str()) if fast is not None else {"vocabulary": tokenizer.get_vocab()}
    made = {name: part for name, part in made.items() if name not in ("truncation", "padding")}
    ways = ("clean_up_tokenization_spaces", "add_bos_token", "add_eos_token", "split_special_tokens")
    made["ways"] = [type(tokenizer).__name__ if fast is None else "", *(getattr(tokenizer, way, None) for way in ways)]
    return json.dumps(made, sort_keys=True, ensure_ascii=True, default=str)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
