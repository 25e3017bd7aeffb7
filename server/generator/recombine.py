"""Augmentation without a language model: new pairs by recombining the user's own items.

It stands in for a cloud model on text that the embedded world did not make, and is a baseline of its own (what is a
language model worth over recombination?). Its model id is `recombine`: no language model wrote these samples, and every
table that carries the model id shows it. Deterministic in the request's seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from untether.server.generator import Completion, GenerationRequest, system_fingerprint
from untether.sim.core.records import Interaction
from untether.sim.core.seeding import generator as stream
from untether.sim.prompts.protocol import Request, estimate_tokens, format_samples, parse_request

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\w+")
_OPTIONS = re.compile(r'\[1\]: "(.*?)" \[2\]: "(.*)"', re.DOTALL)
# LaMP-1 needs a plausible reference from elsewhere; recombination has only the user, so these stand in for strangers.
_STRANGERS = (
    "Glazes and Kilns of Early Modern Provincial Pottery",
    "Seasonal Migration of Wading Birds on Northern Estuaries",
    "Tax Farming and Municipal Credit in the Sixteenth Century",
    "Soil Moisture and the Yield of Rainfed Barley",
    "Ornament and Counterpoint in Baroque Keyboard Suites",
    "Dental Wear in Medieval Burial Populations",
    "Tidal Sediment Transport in Shallow Inlets",
    "Vowel Length in Dialects of the Western Coast",
)

Rng = np.random.Generator
T = TypeVar("T")


class RecombineGenerator:
    """Recombines the items of a request; an `answer` request gets the output of the nearest item.

    For a class label or a rating, sentences of two items with the same output are merged under that output; for free
    text, an input loses sentences or words and keeps its output. LaMP-7 and LaMP-1, whose items are not query-shaped,
    have a rule of their own.
    """

    name = "recombine"
    model_id = "recombine"
    fingerprint = system_fingerprint("recombine", 1, _STRANGERS)
    batched = False
    structured = True

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """Returns completions as `Generator.generate` does. Tokens are `sim.prompts.protocol.estimate_tokens`."""
        return [self._one(request) for request in batch]

    def _one(self, request: GenerationRequest) -> Completion:
        asked = parse_request(request.messages)
        tokens_in = sum(estimate_tokens(str(m.get("content") or "")) for m in request.messages)
        text = answer(asked) if asked.kind == "answer" else format_samples(recombine(asked, request.seed))
        tokens_out = estimate_tokens(text)
        if tokens_out > request.max_tokens:
            return Completion(text[: 4 * request.max_tokens], tokens_in, request.max_tokens, "length")
        return Completion(text, tokens_in, tokens_out)


def recombine(asked: Request, seed: int) -> list[tuple[str, str]]:
    """Returns up to `asked.count` distinct pairs that are no copies of the items; fewer where the items allow no more.
    """
    if not asked.items:
        return []
    rng = stream(seed, "recombine")
    rule = _rule(asked)
    seen = {(item.input.strip(), item.output.strip()) for item in asked.items}
    pairs: list[tuple[str, str]] = []
    for _ in range(6 * asked.count):
        if len(pairs) == asked.count:
            break
        text, output = rule(rng)
        pair = text.strip(), output.strip()
        if all(pair) and pair not in seen:
            seen.add(pair)
            pairs.append(pair)
    return pairs


def answer(asked: Request) -> str:
    """Returns the output of the item whose input shares the most words with the query (the newest of equals).

    For LaMP-7 it is the query itself (no model paraphrases it), for LaMP-1 the reference nearest to one of the titles.
    """
    forms = {item.form for item in asked.items}
    options = _OPTIONS.search(asked.query)
    if "complete" in forms:
        return asked.query
    if "title" in forms and options:
        scores = [max(_overlap(_bag(o), _bag(item.output)) for item in asked.items) for o in options.groups()]
        return "[1]" if scores[0] >= scores[1] else "[2]"
    query = _bag(asked.query)
    best = max(reversed(asked.items), key=lambda item: _overlap(query, _bag(item.input)), default=None)
    if best is None or (asked.labels and best.output not in asked.labels):
        return asked.labels[0] if asked.labels else ""
    return best.output


def _rule(asked: Request) -> Callable[[Rng], tuple[str, str]]:
    forms = {item.form for item in asked.items}
    if "title" in forms:
        titles = [item.output for item in asked.items]
        return lambda rng: _citation(titles, rng)
    if "complete" in forms:
        texts = [f"{item.input} {item.output}" for item in asked.items]
        return lambda rng: _tweet(texts, rng)
    if asked.labels:
        groups: dict[str, list[str]] = {}
        for item in asked.items:
            groups.setdefault(item.output, []).append(item.input)
        outputs = [item.output for item in asked.items]  # a label as often as the user gives it
        return lambda rng: _labelled(groups, _pick(outputs, rng), rng)
    return lambda rng: _free(_pick(asked.items, rng), rng)


def _labelled(groups: dict[str, list[str]], label: str, rng: Rng) -> tuple[str, str]:
    """Some sentences of one text, then some of another with the same label; one text alone loses a part of itself."""
    texts = groups[label]
    if len(texts) < 2:
        return _shorter(texts[0], rng), label
    first, second = (texts[i] for i in rng.choice(len(texts), 2, replace=False))
    left, right = _sentences(first), _sentences(second)
    if len(left) == 1 and len(right) == 1:
        return " ".join([*_halves(first)[:1], *_halves(second)[1:]]), label
    return " ".join([*_some(left, rng), *_some(right, rng)]), label


def _some(parts: Sequence[str], rng: Rng) -> list[str]:
    """About half of the parts (at least one), in their order."""
    if not parts:
        return []
    low = -(-len(parts) // 3)
    size = int(rng.integers(low, max(low, 2 * len(parts) // 3) + 1))
    return [parts[i] for i in sorted(rng.choice(len(parts), size, replace=False))]


def _free(item: Interaction, rng: Rng) -> tuple[str, str]:
    return _shorter(item.input, rng), item.output


def _tweet(texts: Sequence[str], rng: Rng) -> tuple[str, str]:
    """A tweet of the user's sentences, and before it the same in plain words: no marks, no tags, no capitals."""
    text = _pick(texts, rng)
    sentences = _sentences(text)
    if len(sentences) > 1:
        keep = sorted(rng.choice(len(sentences), max(1, len(sentences) - 1), replace=False))
        text = " ".join(sentences[i] for i in keep)
    elif len(texts) > 1 and rng.random() < 0.3:
        text = " ".join([*_halves(text)[:1], *_halves(_pick(texts, rng))[1:]])
    words = [w for w in text.split() if not w.startswith(("#", "@", "http"))]
    plain = " ".join(_WORD.findall(" ".join(words).lower()))
    return _drop_words(plain, rng, 0.1), text


def _citation(titles: Sequence[str], rng: Rng) -> tuple[str, str]:
    """One of the user's titles as the paper, another as the fitting reference, a stranger's as the other one."""
    if len(titles) < 2:
        paper, fitting = _shorter(titles[0], rng), titles[0]
    else:
        paper, fitting = (titles[i] for i in rng.choice(len(titles), 2, replace=False))
    options = [fitting, _pick(_STRANGERS, rng)]
    right = int(rng.integers(2))
    if right == 1:
        options.reverse()
    return f'"{paper}" [1]: "{options[0]}" [2]: "{options[1]}"', f"[{right + 1}]"


def _shorter(text: str, rng: Rng) -> str:
    """`text` without one or more of its sentences (order kept), or without some of its words if it has but one."""
    sentences = _sentences(text)
    if len(sentences) < 3:
        return _drop_words(text, rng, 0.2)
    size = int(rng.integers(max(1, len(sentences) // 2), len(sentences)))
    return " ".join(sentences[i] for i in sorted(rng.choice(len(sentences), size, replace=False)))


def _drop_words(text: str, rng: Rng, share: float) -> str:
    words = text.split()
    kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= share]
    return " ".join(kept or words[:1])


def _sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def _halves(text: str) -> list[str]:
    words = text.split()
    middle = -(-len(words) // 2)
    return [part for part in (" ".join(words[:middle]), " ".join(words[middle:])) if part]


def _pick(options: Sequence[T], rng: Rng) -> T:
    return options[int(rng.integers(len(options)))]


def _bag(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.lower()))


def _overlap(left: Counter[str], right: Counter[str]) -> float:
    """Dice coefficient of two bags of words."""
    total = left.total() + right.total()
    return 2 * (left & right).total() / total if total else 0.0
