"""The wording of the prompts, in one place with a version and a hash, so that a run can record exactly what was asked.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

PROMPT_VERSION = "1"

SAMPLES_SYSTEM = (
    "You help to personalize a small on-device language model for one user. You are shown samples of what this user "
    "reads or writes, and you write new training pairs that this same user could have produced. Keep the user's "
    "style, vocabulary, preferences and the typical length of their texts. Vary the topics. Never copy or merely "
    "rephrase a sample. Reply with JSON only."
)
SAMPLES_USER = """Task: {name} ({title})
{description}
{labels}{forms}
Samples of the user, newest first, one JSON object a line:
{items}
End of samples.

Write {count} new input-output pairs of this task for this user.
{pair_form}
Reply with one JSON object and nothing else:
{{"samples": [{{"input": "...", "output": "..."}}]}}"""

ANSWER_SYSTEM = (
    "You answer a request of one user the way this user would want it answered. You are shown samples of what this "
    "user reads or writes: follow their style and preferences. Reply with the output alone, without explanation."
)
ANSWER_USER = """Task: {name} ({title})
{description}
{labels}{forms}
Samples of the user, newest first, one JSON object a line:
{items}
End of samples.

{pair_form}
Give the output for this new input:
{query}"""

LABELS = "The output is exactly one of these labels: {labels}\n"
FORMS = "Samples marked with another form than the task's own: {form}.\n"


class TaskForm(NamedTuple):
    """How a task is described to a language model: what it is, and what `input` and `output` of a pair look like."""

    description: str
    pair_form: str
    item_form: str = ""


TASK_FORMS: dict[str, TaskForm] = {
    "LaMP_1": TaskForm(
        "Decide which of two papers the user would cite in a paper of theirs.",
        'A pair: "input" is the title of a paper that the user could write and two candidate references, in the form '
        '`"<title>" [1]: "<title of a paper>" [2]: "<title of a paper>"`; "output" is `[1]` or `[2]`, the one that '
        "fits the user's research; the other one is plausible, and of another field. Use both answers equally often.",
        '"title": the input is the abstract of a paper that the user wrote, the output its title',
    ),
    "LaMP_2": TaskForm(
        "Tag a movie, by its description, with the tag that the user would give it.",
        'A pair: "input" is the description of a movie, "output" the tag.',
    ),
    "LaMP_2N": TaskForm(
        "Sort a news article into the category that the user, its author, would choose.",
        'A pair: "input" is the text of an article, "output" its category.',
    ),
    "LaMP_3": TaskForm(
        "Predict the rating, from 1 (worst) to 5 (best), that the user gives with a product review of theirs.",
        'A pair: "input" is the text of a review by the user, "output" the rating, one digit.',
    ),
    "LaMP_4": TaskForm(
        "Write the headline that the user, a journalist, would give to an article of theirs.",
        'A pair: "input" is the text of an article, "output" its headline.',
    ),
    "LaMP_5": TaskForm(
        "Write the title that the user, a researcher, would give to a paper of theirs.",
        'A pair: "input" is the abstract of a paper, "output" its title.',
    ),
    "LaMP_7": TaskForm(
        "Paraphrase a tweet in the user's own words and style.",
        'A pair: "input" is a tweet\'s content in plain, neutral words, "output" the same tweet as this user would '
        "write it, with their spelling, abbreviations and punctuation.",
        '"complete": the input is the beginning of a tweet of the user, the output the rest of that same tweet',
    ),
}


def prompt_templates() -> dict[str, object]:
    """Returns the prompts verbatim with their version and hash, for `environment.json`."""
    texts: dict[str, object] = {
        "samples_system": SAMPLES_SYSTEM,
        "samples_user": SAMPLES_USER,
        "answer_system": ANSWER_SYSTEM,
        "answer_user": ANSWER_USER,
        "labels": LABELS,
        "forms": FORMS,
        "tasks": {name: form._asdict() for name, form in TASK_FORMS.items()},
    }
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    return {"version": PROMPT_VERSION, "sha256": digest, **texts}
