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

from untether.sim.core.errors import UserError
from untether.sim.core.text import shown, valid
from untether.sim.experiment.sections import NOW, SYSTEM

DATE = "2024-07-26"
"""What a template that asks for today's date is told (the date that Llama 3.2's own falls back on)."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables that tell a template whether the model thinks before it answers (Qwen3, SmolLM3; DeepSeek, Granite)."""

_BRACKETS = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")

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
    turns = [{**turn, "content": valid(turn["content"])} for turn in turns]
    system, today = given.pop(SYSTEM, ""), given.pop(NOW, DATE)
    if system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    template = template_of(tokenizer)
    if not template:
        return "\n\n".join(turn["content"] for turn in turns)
    options = {
        "chat_template": _fixed(template, today), "tokenize": False, "add_generation_prompt": True, **given,
    }  # fmt: skip
    first: Exception | None = None
    for form in ("", "merged", "led"):
        written = _form(turns, form)
        if written is None:
            continue
        try:
            return _written(tokenizer, written, options)
        except Exception as error:  # templates raise their own error where a system turn is refused, or demanded
            first = first or error
    assert first is not None
    raise first


def _form(turns: Sequence[Mapping[str, str]], form: str) -> list[dict[str, str]] | None:
    """Returns the turns as they are; with the system turn put before the user's text; with an empty one in front."""
    plain = [dict(turn) for turn in turns]
    has_system = plain[0]["role"] == "system"
    if form == "merged":
        if not has_system or len(plain) < 2:
            return None
        return [{**plain[1], "content": f"{plain[0]['content']}\n\n{plain[1]['content']}"}, *plain[2:]]
    if form == "led":
        return None if has_system else [{"role": "system", "content": ""}, *plain]
    return plain


def _written(tokenizer: Any, turns: list[dict[str, str]], told: Mapping[str, Any]) -> str:
    """Returns the text. A template that walks over parts of a content writes nothing of a plain text: it gets parts."""
    text = tokenizer.apply_chat_template(turns, **told)
    last = turns[-1]["content"].strip()
    if last and last not in text:
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            other = tokenizer.apply_chat_template(parts, **told)
        except Exception:
            return text
        return other if last in other and "'type'" not in other else text
    return text


def check(tokenizer: Any, said: str) -> None:
    """Raises UserError, which begins with `said`, where the chat template cannot be rendered or drops the text."""
    if not template_of(tokenizer):
        return
    probe = "a sentence that must be there"
    try:
        written = render(tokenizer, [{"role": "user", "content": probe}])
    except Exception as error:
        reason = shown(str(error), 200) or type(error).__name__
        raise UserError(
            f"{said}: its chat template cannot be rendered ({reason}). "
            "Correct chat_template in its tokenizer's files, or set model.template_args as the template asks"
        ) from error
    if probe not in written:
        raise UserError(
            f"{said}: its chat template leaves the user's text out. Correct chat_template in its tokenizer's files"
        )


def encode(tokenizer: Any, turns: Sequence[Mapping[str, str]], behind: str = "\n") -> list[int]:
    """Returns the token ids of a chat that the model continues. A control token that a turn's text spells stays text.

    Without a template: [bos] where the tokenizer writes one, and the turns, a paragraph each, with `behind` behind.
    """
    written = render(tokenizer, turns)
    texts = [turn["content"] for turn in turns]
    if template_of(tokenizer):
        return _ids(tokenizer, written, texts)
    return ([tokenizer.bos_token_id] if _adds_bos(tokenizer) else []) + _ids(tokenizer, written + behind, texts)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text that holds no control token, whatever it spells."""
    text = valid(text)
    return _ids(tokenizer, text, [text])


def _ids(tokenizer: Any, written: str, texts: Sequence[str]) -> list[int]:
    """Ids of `written`, in which `texts` stand, read in pieces: cut within every control token that the texts spell."""
    cuts, at = [0], 0
    for text in texts:
        spelled = _control(tokenizer).finditer(text.strip())
        for found in spelled:
            begin = written.find(text.strip(), at)
            if begin < 0:  # the template has changed the text: look for the word alone
                begin = written.find(found[0], max(at, cuts[-1])) - found.start()
            if begin + found.start() >= 0:
                cuts.append(begin + found.start() + 1)
        at = max(at, written.find(text.strip(), at))
    ends = [*cuts[1:], len(written)]
    pieces = [written[begin:end] for begin, end in zip(cuts, ends, strict=True)]
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def _control(tokenizer: Any) -> re.Pattern[str]:
    """All that the tokenizer reads as one token of control: its special tokens, and added ones in brackets."""
    kept = getattr(tokenizer, "control_pattern", None)
    if kept is None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        words = {*tokenizer.all_special_tokens, *(str(t) for t in added if t.special or _BRACKETS.fullmatch(str(t)))}
        found = sorted((word for word in words if len(word) > 1), key=lambda word: (-len(word), word))
        kept = tokenizer.control_pattern = re.compile("|".join(map(re.escape, found)) or r"(?!)")
    return kept


def _adds_bos(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    probe = tokenizer("a")["input_ids"]
    return bool(probe) and probe[0] == tokenizer.bos_token_id


def turn_end(tokenizer: Any) -> int | None:
    """Returns the token that ends an assistant's turn in the template (`<|im_end|>`, `<|eot_id|>`, ...); the end of
    sequence where the template has none of its own.
    """
    kept = getattr(tokenizer, "turn_end", None)
    if kept is None:
        kept = tokenizer.turn_end = (_turn_end(tokenizer),)
    return kept[0]


def _turn_end(tokenizer: Any) -> int | None:
    template = template_of(tokenizer)
    if not template:
        return tokenizer.eos_token_id
    probe = "an answer that must be there"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": probe}]
    given = arguments(tokenizer)
    given.pop(SYSTEM, None)
    today = given.pop(NOW, DATE)
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=_fixed(template, today), tokenize=False, **given)
    except Exception:  # it has no assistant's turn, or wants more than two
        return tokenizer.eos_token_id
    behind = text.rpartition(probe)[2].strip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind and probe in text else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return ids[0] if ids and ids[0] in special else tokenizer.eos_token_id


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
