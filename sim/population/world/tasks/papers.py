"""LaMP-5: an abstract names a method, a problem, an aim and its data; researchers title it in their own manner."""

from __future__ import annotations

from random import Random

from untether.sim.population.world.banks import Finder, bank, capital, pick, rows, split
from untether.sim.population.world.base import Evidence, Item, QueryShaped, Scene
from untether.sim.population.world.persona import Taste, Traits

WORDS = bank("papers")
AREAS, FAMILIES = tuple(WORDS["area"]), tuple(WORDS["family"])
PROBLEMS = tuple(split(WORDS["area"][a]) for a in AREAS)
METHODS = tuple(split(WORDS["family"][f]) for f in FAMILIES)
KINDS = ("theory", "measure", "system", "survey")
GOALS = tuple(rows(goal)[0] for goal in WORDS["goal"].values())
PREFIXES = ("", "Towards", "Rethinking", "A fresh look at", "Notes on")
TAILS = ("", "with {data}", ": evidence from {data}", "in practice")
FRAMES = (
    "{method} for {problem}", "{problem} with {method}", "{problem}: the case for {method}",
    "can {method} solve {problem}?", "on {problem} and {method}", "{method} meet {problem}",
)  # fmt: skip
_PREFIX, _TAIL, _FRAME, _GOAL = 0, 1, 2, 2 + len(KINDS)


class Papers(QueryShaped):
    """Choices: prefix, tail, the frame for each kind of paper, the adjective (or none) for each aim.

    `facts`: kind, goal, and the words for method, problem and data.
    """

    name = "LaMP_5"
    traits = Traits(
        name,
        (
            ("prefix", "", len(PREFIXES)), ("tail", "", len(TAILS)),
            *((f"frame {kind}", "frame", len(FRAMES)) for kind in KINDS),
            *((f"goal {i}", "goal", 4) for i in range(len(GOALS))),
        ),
    )  # fmt: skip

    def __init__(self) -> None:
        words = WORDS["words"]
        self._data, self._venue = split(words["data"]), split(words["venue"])
        self._kinds = [split(words[kind]) for kind in KINDS]
        finders = {
            "kind": {text: i for i, texts in enumerate(self._kinds) for text in texts},
            "goal": {goal[0]: i for i, goal in enumerate(GOALS)},
            "method": {m: m for ms in METHODS for m in ms},
            "problem": {p: p for ps in PROBLEMS for p in ps},
            "data": {d: d for d in self._data},
        }
        self._finder = Finder({text: (what, v) for what, known in finders.items() for text, v in known.items()})

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a short abstract."""
        return self.abstract(rng, pick(rng, pick(rng, PROBLEMS)), pick(rng, pick(rng, METHODS)))

    def abstract(self, rng: Random, problem: str, method: str) -> Scene:
        """Returns an abstract on a given problem and method."""
        kind, goal, data = int(rng.random() * len(KINDS)), int(rng.random() * len(GOALS)), pick(rng, self._data)
        claim, aim, venue = pick(rng, self._kinds[kind]), GOALS[goal][0], pick(rng, self._venue)
        text = pick(
            rng,
            (
                f"{claim} {method} can handle {problem} {aim}. Evidence comes from {data}. {venue}.",
                f"Progress on {problem} is slow and {data} are rare. {claim} {method} can help {aim}. {venue}.",
                f"{capital(aim)}, work on {problem} is a challenge. {claim} {method} can address it, using {data}. "
                f"{venue}.",
            ),
        )
        return Scene(text, (kind, goal, method, problem, data))

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns the title as this researcher writes it. A prefix goes only before a noun."""
        kind, goal, method, problem, data = scene.facts
        likes = taste.choices
        style, frame = likes[_GOAL + goal], likes[_FRAME + kind]
        full = f"{GOALS[goal][style]} {method}" if style else method
        head = FRAMES[frame].format(method=full, problem=problem)
        prefix = PREFIXES[likes[_PREFIX]] if frame not in (3, 4) else ""
        title = capital(f"{prefix} {head}".strip()) + " " + TAILS[likes[_TAIL]].format(data=data)
        return title.strip().replace(" :", ":")

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        kind, goal, method, problem, data = scene.facts
        return f"{KINDS[kind]}: {GOALS[goal][1]} {method}, {problem}, {data}"

    def read(self, text: str) -> Scene | None:
        """Returns the facts of an abstract; None where one is missing."""
        found = dict(reversed(self._finder.find(text)))
        keys = ("kind", "goal", "method", "problem", "data")
        return Scene(text, tuple(found[k] for k in keys)) if all(k in found for k in keys) else None

    def evidence(self, item: Item) -> Evidence | None:
        """Returns what the title shows of its writer's habits."""
        scene = self.read(item.input)
        if scene is None:
            return None
        kind, goal, method, problem, data = scene.facts
        low = item.output.lower()
        tail = next((i for i, t in enumerate(TAILS) if i and low.endswith(t.format(data=data))), 0)
        prefix = next((i for i, p in enumerate(PREFIXES) if p and item.output.startswith(p)), 0)
        body = low[len(PREFIXES[prefix]) :].strip()
        if "?" in body:
            frame = 3
        elif ": the case for" in body:
            frame = 2
        elif body.startswith("on "):
            frame = 4
        else:
            frame = 5 if f"{method} meet" in body else 0 if f"{method} for" in body else 1
        style = next((i for i in (1, 2, 3) if f"{GOALS[goal][i]} {method}" in low), 0)
        seen = [(_TAIL, (tail,)), (_FRAME + kind, (frame,)), (_GOAL + goal, (style,))]
        return Evidence(tuple(seen if frame in (3, 4) else [*seen, (_PREFIX, (prefix,))]))
