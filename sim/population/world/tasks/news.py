"""LaMP-4: who did what to which thing, where and when; journalists differ in what leads and in every verb."""

from __future__ import annotations

import re
from random import Random

from untether.sim.population.world.banks import bank, capital, common, pick, rows, split
from untether.sim.population.world.base import Evidence, Item, QueryShaped, Scene
from untether.sim.population.world.persona import Taste, Traits

EVENTS = rows(bank("news")["event"])
DESKS = tuple(bank("news")["desk"])
KICKERS = ("", "Breaking:", "Exclusive:", "In pictures:", "Full report:")
TAILS = ("", "officials say", "in {town}", "on {day}", "and locals cheer", "at long last")
FRAMES = (
    "{who} {verb} {what}", "{town}: {who} {verb} {what}", "how {who} {verb} {what}", "{what}? {who} {verb} it",
    "why {town} {who} {verb} {what}", "inside the {what} that {who} {verb}",
)  # fmt: skip
_KICKER, _TAIL, _WHO, _WHAT, _FRAME, _VERB = 0, 1, 2, 3, 4, 4 + len(DESKS)
_TOWN = re.compile(r"\b(?:in|of) ([A-Z]\w+)")
_DAY = re.compile(r"\b[Oo]n (\w+day)\b")


class News(QueryShaped):
    """Choices: kicker, tail, whether adjectives stay, the frame on each desk, the verb for each kind of event.

    `facts`: desk, event, and the words for rank, group, quality, noun, town and day.
    """

    name = "LaMP_4"
    traits = Traits(
        name,
        (
            ("kicker", "", len(KICKERS)), ("tail", "", len(TAILS)), ("who", "", 2), ("what", "", 2),
            *((f"frame {desk}", "frame", len(FRAMES)) for desk in DESKS),
            *((f"verb {event[0]}", "verb", 3) for event in EVENTS),
        ),
    )  # fmt: skip

    def __init__(self) -> None:
        words = bank("news")
        self._group, self._rank, self._quality = (split(words[k], ",") for k in ("group", "rank", "quality"))
        self._reason, self._crowd, self._cost = (split(words[k]) for k in ("reason", "crowd", "cost"))
        self._nouns = [split(words["desk"][desk], ",") for desk in DESKS]
        self._desk_of = {noun: desk for desk, nouns in enumerate(self._nouns) for noun in nouns}
        self._event_of = {event[0]: i for i, event in enumerate(EVENTS)}
        self._town, self._day = common("town"), common("day")

    def scene(self, rng: Random, taste: Taste | None = None) -> Scene:
        """Returns a short article of one to three sentences."""
        desk, event = int(rng.random() * len(DESKS)), int(rng.random() * len(EVENTS))
        rank, group, quality = pick(rng, self._rank), pick(rng, self._group), pick(rng, self._quality)
        noun, town, day = pick(rng, self._nouns[desk]), pick(rng, self._town), pick(rng, self._day)
        reason, more = pick(rng, self._reason), pick(rng, pick(rng, (self._crowd, self._cost)))
        core = f"{rank} {group} {EVENTS[event][0]} the {quality} {noun}"
        text = pick(
            rng,
            (
                f"{capital(core)} in {town} on {day} {reason}. {more}.",
                f"On {day} in {town}, {core} {reason}. {more}.",
                f"{capital(reason)}, {core} of {town} on {day}. {more}.",
                f"{more} on {day} in {town}. {capital(core)} {reason}.",
            ),
        )
        return Scene(text, (desk, event, rank, group, quality, noun, town, day))

    def answer(self, scene: Scene, taste: Taste) -> str:
        """Returns the headline as this journalist writes it."""
        desk, event, rank, group, quality, noun, town, day = scene.facts
        likes = taste.choices
        words = {
            "who": f"{rank} {group}" if likes[_WHO] else group,
            "what": f"{quality} {noun}" if likes[_WHAT] else noun,
            "verb": EVENTS[event][1 + likes[_VERB + event]],
            "town": town,
            "day": day,
        }
        head = capital(FRAMES[likes[_FRAME + desk]].format(**words))
        parts = (KICKERS[likes[_KICKER]], head, TAILS[likes[_TAIL]].format(**words))
        return " ".join(part for part in parts if part)

    def reading(self, scene: Scene) -> str:
        """Returns what the text is about, for any reader."""
        desk, event, rank, group, quality, noun, town, day = scene.facts
        return f"{DESKS[desk]}: {rank} {group} {EVENTS[event][1]} {quality} {noun}, {town}, {day}"

    def read(self, text: str) -> Scene | None:
        """Returns the facts of an article; None where it has no known event."""
        words = text.replace(",", " ").replace(".", " ").split()
        town, day = _TOWN.search(text), _DAY.search(text)
        for at, word in enumerate(words[:-3]):
            event = self._event_of.get(word)
            if event is None or at < 2 or words[at + 1] != "the" or town is None or day is None:
                continue
            noun = " ".join(words[at + 3 : at + 5])
            noun = noun if noun in self._desk_of else words[at + 3]
            if noun in self._desk_of:
                rank, group = words[at - 2].lower(), words[at - 1]
                return Scene(text, (self._desk_of[noun], event, rank, group, words[at + 2], noun, town[1], day[1]))
        return None

    def evidence(self, item: Item) -> Evidence | None:
        """Returns what the headline shows of its writer's habits."""
        scene = self.read(item.input)
        if scene is None:
            return None
        desk, event, rank, _, quality, _, town, day = scene.facts
        head = item.output
        seen = [(_WHO, (int(rank in head.lower()),)), (_WHAT, (int(quality in head.lower()),))]
        kicker = next((k for k in range(1, len(KICKERS)) if head.startswith(KICKERS[k])), 0)
        tail = next((t for t in range(1, len(TAILS)) if head.endswith(TAILS[t].format(town=town, day=day))), 0)
        body = head.removeprefix(KICKERS[kicker]).strip().lower()
        starts = {1: f"{town.lower()}:", 2: "how ", 4: "why ", 5: "inside the "}
        frame = next((f for f, start in starts.items() if body.startswith(start)), 3 if "?" in body else 0)
        verbs = [v for v in range(3) if re.search(rf"\b{EVENTS[event][1 + v]}\b", body)]
        seen += [(_KICKER, (kicker,)), (_TAIL, (tail,)), (_FRAME + desk, (frame,))]
        if verbs:
            seen.append((_VERB + event, (max(verbs, key=lambda v: len(EVENTS[event][1 + v])),)))
        return Evidence(tuple(seen))
