"""LaMP-7: the same plain sentence as different people post it: abbreviations, openers, closers, emoticons."""

from __future__ import annotations

import re
from random import Random

from untether.sim.population.tasks import get_task
from untether.sim.population.world.banks import bank, pick, rows, split
from untether.sim.population.world.base import Evidence, Item, QueryShaped, Scene
from untether.sim.population.world.persona import Taste, Traits

WORDS = bank("posts")
LEXICON = rows(WORDS["lexicon"])
MOODS = tuple(WORDS["mood"])
OPENERS = ("", "omg", "ok so", "lol", "ugh", "honestly")
CLOSERS = ("", "haha", "smh", "no joke", "just saying", "fr")
FACES = ("", ":)", "<3", "!!", ":/")
_SLOTS = {k: split(WORDS[k], ",") for k in ("food", "hobby", "thing", "place", "who", "work")}
_FACE, _OPENER, _CLOSER, _WORD = 0, 1, 1 + len(MOODS), 1 + 2 * len(MOODS)


class Posts(QueryShaped):
    """Choices: emoticon, opener and closer for each mood, and how each word of the lexicon is spelt. `facts`: mood."""

    name = "LaMP_7"
    traits = Traits(
        name,
        (
            ("face", "", len(FACES)),
            *((f"opener {m}", "opener", len(OPENERS)) for m in MOODS),
            *((f"closer {m}", "closer", len(CLOSERS)) for m in MOODS),
            *((f"word {w[0]}", "word", 3) for w in LEXICON),
        ),
    )

    def __init__(self) -> None:
        self._templates = [split(WORDS["mood"][mood], "\n") for mood in MOODS]
        slots = {name: f"(?:{'|'.join(map(re.escape, items))})" for name, items in _SLOTS.items()}
        self._patterns = [
            (
                mood,
                re.compile(re.escape(template).replace(r"\{", "{").replace(r"\}", "}").format(**slots), re.IGNORECASE),
            )
            for mood, templates in enumerate(self._templates)
            for template in templates
        ]
        self._index = {row[0]: i for i, row in enumerate(LEXICON)}
        self._plain = _alternatives(self._index)
        styled: dict[str, list[tuple[int, int]]] = {}
        for i, row in enumerate(LEXICON):
            for v, form in enumerate(row):
                styled.setdefault(form, []).append((i, v))
        self._styled, self._any = styled, _alternatives(styled)

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a plain sentence."""
        mood = int(rng.random() * len(MOODS))
        template = pick(rng, self._templates[mood])
        return Scene(template.format(**{k: pick(rng, v) for k, v in _SLOTS.items()}), mood)

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns the sentence as this person posts it."""
        likes = taste.choices
        body = self._plain.sub(lambda m: self._spell(m[0], likes), scene.text.lower())
        mood = scene.facts
        parts = (OPENERS[likes[_OPENER + mood]], body, CLOSERS[likes[_CLOSER + mood]], FACES[likes[_FACE]])
        return " ".join(part for part in parts if part)

    def item(self, rng: Random, taste: Taste) -> Item:
        """Returns a post by the user, as its first words and the rest."""
        post = self.answer(self.scene(rng), taste)
        pair = get_task(self.name).interactions({"text": post})[0]
        return Item(pair.input, pair.output, pair.form)

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        return f"{MOODS[scene.facts]}: {scene.text.lower()}"

    def read(self, text: str) -> Scene | None:
        """Returns the mood of a plain sentence; None where it is none of this world's."""
        plain = text.strip().rstrip(".")
        mood = next((mood for mood, pattern in self._patterns if pattern.fullmatch(plain)), None)
        return None if mood is None else Scene(text, mood)

    def evidence(self, item: Item) -> Evidence | None:
        """Returns from a post (whole, or first words and rest) how its writer opens, closes and spells."""
        post = f"{item.input} {item.output}" if item.form == "complete" else item.output
        face = next((f for f in range(1, len(FACES)) if post.endswith(" " + FACES[f])), 0)
        seen = [(_FACE, (face,))]
        body = post.removesuffix(FACES[face]).strip()
        for opener in range(len(OPENERS)):
            for closer in range(len(CLOSERS)):
                if not (body.startswith(OPENERS[opener]) and body.endswith(CLOSERS[closer])):
                    continue
                middle = body.removeprefix(OPENERS[opener]).removesuffix(CLOSERS[closer]).strip()
                scene = self.read(self._any.sub(lambda m: LEXICON[self._styled[m[0]][0][0]][0], middle))
                if scene is None:
                    continue
                seen += [(_OPENER + scene.facts, (opener,)), (_CLOSER + scene.facts, (closer,))]
                for form in self._any.findall(middle):
                    word = self._styled[form][0][0]
                    seen.append((_WORD + word, tuple(v for i, v in self._styled[form] if i == word)))
                return Evidence(tuple(seen))
        return None

    def _spell(self, word: str, likes: tuple[int, ...]) -> str:
        index = self._index[word]
        return LEXICON[index][likes[_WORD + index]]


def _alternatives(forms: dict[str, object]) -> re.Pattern[str]:
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
