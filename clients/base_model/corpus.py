"""The pretraining corpus of the embedded model: prompts and answers of other people, without their names.

Only users and archetypes of the world's `pretraining` split occur. A document is one prompt with its answer; some have
items of the same user in front, as the rag arm shows them; some are of a task's auxiliary form; some only ask what a
text is about. The last kind teaches the model to read before it learns preferences, so it is frequent in early chunks.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.sim.core.seeding import generator
from untether.sim.population.tasks import get_task, rag_prompt
from untether.sim.population.world import WORLD_TASKS, World, world_task

USERS_A_CHUNK = 96
AUXILIARY_SHARE = 0.25
READING = "What is this about? {}"
EARLY_CHUNKS = 20
PER_USER = 8
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Document(NamedTuple):
    """One prompt and its answer, as text."""

    task: str
    prompt: str
    answer: str


class Encoded(NamedTuple):
    """A document as token ids; the answer begins at `answer_at` and ends with the end token."""

    task: str
    ids: list[int]
    answer_at: int


class Batch(NamedTuple):
    """Right-padded rows of like length: `ids` and `is_answer` `[rows, tokens]`, `lengths` `[rows]`."""

    ids: np.ndarray
    is_answer: np.ndarray
    lengths: np.ndarray


def documents(seed: int, chunk: int, split: str = "pretraining", users: int = 0) -> list[Document]:
    """Returns the documents of one chunk of the corpus, which follow from the arguments alone.

    Args:
        seed: Of the corpus.
        chunk: Number of the chunk; every chunk has other users.
        split: The world's split that the users are of.
        users: How many users; 0 is a chunk's usual number.
    """
    users = users or USERS_A_CHUNK
    world, rng = World(seed), generator(seed, "corpus", split, chunk)
    late = min(1.0, chunk / EARLY_CHUNKS) if split == "pretraining" else 1.0
    rag_share, reading_share = 0.08 + 0.17 * late, 0.6 - 0.52 * late
    found = []
    for index in range(chunk * users, (chunk + 1) * users):
        user = world.user(index, split, history=(PER_USER, PER_USER), queries=PER_USER)
        for name in WORLD_TASKS:
            task, items = get_task(name), user.of_task(name)
            for query in (q for q in user.queries if q.task == name):
                shown: Sequence = ()
                if rng.random() < rag_share:
                    most = PER_USER if rng.random() < 0.1 else 4
                    shown = [items[i] for i in rng.permutation(PER_USER)[: rng.integers(2, most + 1)]]
                found.append(Document(name, rag_prompt(task, shown, query.input), query.gold))
                if split == "pretraining" and rng.random() < reading_share:
                    mine = world_task(name)
                    found.append(Document(name, READING.format(query.input), mine.reading(mine.read(query.input))))
            for item in items:
                if item.form != "query" and rng.random() < AUXILIARY_SHARE:
                    found.append(Document(name, task.prompt(item.input, form=item.form), item.output))
    return [found[i] for i in rng.permutation(len(found))]


def build_tokenizer(seed: int, vocabulary: int, chunks: int = 8) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (any text round-trips) on the world's texts and some general English.

    Args:
        seed: Of the texts.
        vocabulary: Number of tokens.
        chunks: How many chunks of the corpus it is trained on.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for chunk in range(chunks) for d in documents(seed, chunk) for text in (d.prompt, d.answer)]
    general = [text for _, text in sorted(pydoc_data.topics.topics.items())][:6]
    raw.train_from_iterator([*texts, *general], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode(tokenizer: PreTrainedTokenizerFast, found: Sequence[Document]) -> list[Encoded]:
    """Returns the token ids of documents, as `clients.engine.encoding` makes them on a device."""
    frame = encode_prompt(tokenizer, "\x00")
    inside = tokenizer("\x00", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(frame)) if frame[i : i + len(inside)] == inside)
    before, after = frame[:at], frame[at + len(inside) :]
    prompts = tokenizer([d.prompt for d in found], add_special_tokens=False)["input_ids"]
    answers = tokenizer([d.answer for d in found], add_special_tokens=False)["input_ids"]
    end = encode_answer(tokenizer, "")
    return [
        Encoded(d.task, [*before, *p, *after, *a, *end], len(before) + len(p) + len(after))
        for d, p, a in zip(found, prompts, answers, strict=True)
    ]


def batches(found: Sequence[Encoded], tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Yields all documents once, in batches of similar length, in random order.

    Args:
        found: The documents.
        tokens: Most tokens of a batch, padding included.
        rng: Draws the order.
    """
    order = sorted(range(len(found)), key=lambda i: len(found[i].ids))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(found[i].ids) > tokens:
            groups.append([])
        groups[-1].append(i)
    for g in rng.permutation(len(groups)):
        rows = [found[i] for i in groups[g]]
        width = max(len(row.ids) for row in rows)
        ids, is_answer = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), bool)
        for r, row in enumerate(rows):
            ids[r, : len(row.ids)] = row.ids
            is_answer[r, row.answer_at : len(row.ids)] = True
        yield Batch(ids, is_answer, np.array([len(row.ids) for row in rows]))
