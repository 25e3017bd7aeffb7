"""The cloud model of the embedded world: it reads a user's samples, infers the user, and writes more of the same.

It sees only what the request carries. Its prior knowledge is configurable (`knowledge`: the archetypes it has met), and
so are faults such as real language models have. How each sample was made stays on this side of the wire, in the `truth`
file; evaluations of filters join it afterwards with `read_truth`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

from untether.server.generator import Completion, GenerationRequest, system_fingerprint
from untether.sim.core.errors import UserError
from untether.sim.core.seeding import derive
from untether.sim.population.world import WORLD_TASKS, world_task
from untether.sim.population.world.banks import pick
from untether.sim.population.world.base import Item, WorldTask
from untether.sim.population.world.belief import KNOWLEDGE, infer
from untether.sim.population.world.persona import Taste, archetype, pick_archetype, with_quirks
from untether.sim.prompts.protocol import Request, clean, estimate_tokens, format_samples, parse_request

VERSION = 1
TRUTHS = ("good", "hallucination", "off_topic", "duplicate", "malformed", "verbose")
_RAMBLING = (
    "which, all things considered, seems to be the most fitting choice for someone with these preferences in general",
    "and I could also offer several other versions of this if you would like me to go into more detail about it",
    "because this is, as far as one can tell from the samples shown above, very much what the user tends to prefer",
)
_PREFACES = ("Sure! Here is what you asked for", "As an AI model I cannot be certain", "[output missing]", "N/A")


class NotOfThisWorld(ValueError):
    """The request is about texts that the embedded world did not make, so its generator cannot write more of them."""


class WorldGenerator:
    """Writes pairs, or answers a query, in the persona it infers from the samples that a request shows.

    Rates are probabilities per sample and together at most 1.

    Args:
        knowledge: Which archetypes it knows.
        hallucination_rate: Right form, wrong persona (for answers too).
        off_topic_rate: About something else.
        duplicate_rate: A copy of a shown item, or of an earlier pair where items are not query-shaped.
        malformed_rate: A broken pair.
        verbosity: Share of the other outputs that ramble.
        truth: A JSONL file that gets one line a sample; empty: none.
    """

    name = "world"
    model_id = "world"
    batched = False
    structured = True

    def __init__(
        self,
        knowledge: str = "pretraining",
        hallucination_rate: float = 0.10,
        off_topic_rate: float = 0.05,
        duplicate_rate: float = 0.05,
        malformed_rate: float = 0.03,
        verbosity: float = 0.05,
        truth: str = "",
    ) -> None:
        if knowledge not in KNOWLEDGE:
            raise UserError(f"world generator: knowledge {knowledge!r} is none of {', '.join(KNOWLEDGE)}")
        rates = (hallucination_rate, off_topic_rate, duplicate_rate, malformed_rate)
        if min(*rates, verbosity) < 0 or sum(rates) > 1 or verbosity > 1:
            raise UserError(f"world generator: rates {rates} must be in 0 to 1 and add up to at most 1, verbosity too")
        self._knowledge, self._rates, self._verbosity = knowledge, dict(zip(TRUTHS[1:5], rates, strict=True)), verbosity
        self._truth = Path(truth) if truth else None
        self._lock = threading.Lock()
        self.fingerprint = system_fingerprint("world", VERSION, knowledge, rates, verbosity)

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """Returns completions as `Generator.generate` does.

        Raises:
            NotOfThisWorld: The texts are none of the world's.
        """
        return [self._one(request) for request in batch]

    def complete(self, asked: Request, seed: int) -> list[tuple[str, str, str]]:
        """Returns the pairs for a samples request as (input, output, truth)."""
        task, taste, rng = self._read(asked, seed)
        shown = [(item.input, item.output) for item in asked.items]
        written: list[tuple[str, str, str]] = []
        for _ in range(asked.count):
            written.append(self._sample(task, taste, rng, shown, written))
        return written

    def answer(self, asked: Request, seed: int) -> str:
        """Returns the answer to a query as the inferred persona would give it."""
        task, taste, rng = self._read(asked, seed)
        scene = task.read(asked.query)
        if scene is None:
            raise NotOfThisWorld(f"the query is no {asked.task} text of the embedded world")
        if rng.random() < self._rates["hallucination"]:
            taste = _stranger(task, rng)
        return task.answer(scene, taste)

    def _one(self, request: GenerationRequest) -> Completion:
        asked = parse_request(request.messages)
        tokens_in = sum(estimate_tokens(str(m.get("content") or "")) for m in request.messages)
        if asked.kind == "answer":
            text = self.answer(asked, request.seed)
        else:
            pairs = self.complete(asked, request.seed)
            self._keep_truth(asked.task, pairs)
            text = format_samples([pair[:2] for pair in pairs])
        tokens_out = estimate_tokens(text)
        if tokens_out > request.max_tokens:
            return Completion(text[: 4 * request.max_tokens], tokens_in, request.max_tokens, "length")
        return Completion(text, tokens_in, tokens_out)

    def _read(self, asked: Request, seed: int) -> tuple[WorldTask, Taste, Random]:
        if asked.task not in WORLD_TASKS:
            raise NotOfThisWorld(f"the embedded world has no task {asked.task}")
        items = tuple(Item(item.input, item.output, item.form) for item in asked.items)
        taste = _infer(asked.task, items, self._knowledge)
        if taste is None:
            raise NotOfThisWorld(f"most of the samples shown are no {asked.task} texts of the embedded world")
        return world_task(asked.task), taste, Random(derive(seed, asked.kind, asked.query, *items))

    def _sample(
        self,
        task: WorldTask,
        taste: Taste,
        rng: Random,
        shown: list[tuple[str, str]],
        written: list[tuple[str, str, str]],
    ) -> tuple[str, str, str]:
        kind, left = "good", rng.random()
        for name, rate in self._rates.items():
            if left < rate:
                kind = name
                break
            left -= rate
        if kind == "duplicate":
            return (*_copied(task, rng, shown, written), kind)
        if kind == "off_topic":
            return (*_elsewhere(task, rng), kind)
        scene = task.scene(rng, taste)
        while any(scene.text == pair[0] for pair in (*shown, *written)):
            scene = task.scene(rng, taste)
        output = task.answer(scene, taste)
        if kind == "hallucination":
            output = _mistaken(task, scene, output, rng)
        elif kind == "malformed":
            return (*_broken(scene.text, output, rng), kind)
        if rng.random() < self._verbosity:
            return scene.text, f"{output}, {pick(rng, _RAMBLING)}", "verbose" if kind == "good" else kind
        return scene.text, output, kind

    def _keep_truth(self, task: str, pairs: list[tuple[str, str, str]]) -> None:
        if self._truth is None:
            return
        lines = [
            json.dumps({"task": task, "input": clean(i).strip(), "output": clean(o).strip(), "truth": truth})
            for i, o, truth in pairs
        ]
        with self._lock, self._truth.open("ab", buffering=0) as file:  # one write: other runs may write there too
            file.write("".join(line + "\n" for line in lines).encode())


def read_truth(path: Path) -> dict[tuple[str, str, str], str]:
    """Returns how each written sample was made, by (task, input, output); nothing where there is no file.

    A last line cut short by a crash is ignored: its answer never left. Of equal samples the first truth counts.
    """
    truths: dict[tuple[str, str, str], str] = {}
    if not Path(path).exists():
        return truths
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            truths.setdefault((sys.intern(row["task"]), row["input"], row["output"]), sys.intern(row["truth"]))
    return truths


@lru_cache(maxsize=1024)
def _infer(name: str, items: tuple[Item, ...], knowledge: str) -> Taste | None:
    """The persona behind `items`, None where fewer than half of them can be read."""
    task = world_task(name)
    evidence = [found for item in items if (found := task.evidence(item)) is not None]
    return infer(task, evidence, knowledge) if items and 2 * len(evidence) >= len(items) else None


def _stranger(task: WorldTask, rng: Random) -> Taste:
    usual = archetype(task.traits, pick_archetype(rng, "pretraining"))
    return with_quirks(task.traits, usual, rng)


def _mistaken(task: WorldTask, scene, right: str, rng: Random) -> str:
    """What somebody else would answer: another answer than the right one wherever a few strangers can find one."""
    output = right
    for _ in range(12):
        output = task.answer(scene, _stranger(task, rng))
        if output != right:
            break
    return output


def _copied(task: WorldTask, rng: Random, shown, written) -> tuple[str, str]:
    """A shown item where the task's items are query-shaped, else an earlier pair, else the item as it is."""
    fit = [pair for pair in shown if task.read(pair[0]) is not None]
    return pick(rng, fit or [pair[:2] for pair in written] or shown)


def _elsewhere(task: WorldTask, rng: Random) -> tuple[str, str]:
    """A text of another task, with an output of this task's form where that is a label."""
    other = world_task(pick(rng, [name for name in WORLD_TASKS if name != task.name]))
    scene, mine = other.scene(rng), task.scene(rng)
    labelled = task.name in ("LaMP_1", "LaMP_2", "LaMP_3")
    output = task.answer(mine, _stranger(task, rng)) if labelled else other.answer(scene, _stranger(other, rng))
    return scene.text, output


def _broken(text: str, output: str, rng: Random) -> tuple[str, str]:
    """One of the ways in which models break a pair: cut short, swapped, talked about, or empty."""
    way = int(rng.random() * 4)
    if way == 0:
        return text[: len(text) // 3], output[: max(1, len(output) // 3)]
    if way == 1:
        return output, text
    return text, pick(rng, _PREFACES) if way == 2 else ""
