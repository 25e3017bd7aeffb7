"""The LaMP tasks in LaMP's own words: one record a task, in a registry by name.

A history item and a query hold content alone (an article, a review); the instruction around it is the task's, and is
added and removed only here. Wording of the queries: the official LaMP files. Wording of retrieved history: the per-task
prompts of LaMP (Salemi et al., 2023, arXiv 2304.11406, and its public `prompts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from untether.sim.core.kinds import METRICS, TASKS
from untether.sim.core.records import Interaction
from untether.sim.population.dates import date_span

MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic", "psychology",
    "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
NEWS_CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
)  # fmt: skip

_OF_A_SET = {"macro_f1": "accuracy", "rmse": "mae"}
"""Metrics that a single answer does not have, and the one with which they share what is better, and the unit."""


def of_answers(metrics: Sequence[str]) -> list[str]:
    """Returns those of some metrics that a single answer has."""
    return [metric for metric in metrics if metric not in _OF_A_SET]


def higher_is_better(metric: str) -> bool:
    """Returns whether a larger value of a metric is better (not so for `mae` and `rmse`)."""
    return METRICS.fact(_OF_A_SET.get(metric, metric), "higher_is_better")


def unit(metric: str) -> str:
    """Returns the unit of a metric's values: `stars`, or nothing for a share (0 to 1)."""
    return METRICS.fact(_OF_A_SET.get(metric, metric), "unit")


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its name, prompts and scoring.

    Args:
        kind: "classification", "rating" or "generation".
        labels: Its closed answers, or None.
        metrics: The official ones.
        primary: The one that tests are made on.
        instructions: Template with one `{content}` by form: "query" is the task's own question, any other form an
            auxiliary pair made from profiles that are not shaped like queries (see `Interaction.form`).
        fields: The profile's input and output fields of `item_form`.
    """

    name: str
    title: str
    kind: str
    metrics: tuple[str, ...]
    primary: str
    max_new_tokens: int
    instructions: Mapping[str, str] = field(hash=False)
    fields: tuple[str, str]
    history_item: str
    history_frame: str = "{history}. {query}"
    labels: tuple[str, ...] | None = None
    item_form: str = "query"
    _variant: str | None = field(default=None, repr=False)

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the primary metric is the better one."""
        return higher_is_better(self.primary)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that `prompt` knows: "query" first."""
        return tuple(self.instructions)

    def prompt(self, content: str, form: str = "query") -> str:
        """Returns the full prompt of a content: the form's instruction around it, added only if it is not there yet."""
        template = self._template(form)
        if self._strip(content, form) is not None:
            return content
        before, after = template.split("{content}")
        return before + content + after

    def content(self, question_input: str) -> str:
        """Returns a question's content without the official instruction; the whole text where the wording is another.

        `prompt(content(q)) == q` for every question in the official wording. Text without it is taken for content, so
        `prompt` puts the instruction around it. For 2 and 2N a list of labels in another order is removed too, and
        `prompt` writes it back in the official order.
        """
        stripped = self._strip(question_input, "query")
        return question_input if stripped is None else stripped

    def spelled(self, answer: str) -> str:
        """Returns an answer as the label is spelled that it differs from in case alone; any other as it is."""
        if not self.labels or answer in self.labels:
            return answer
        return {label.lower(): label for label in self.labels}.get(answer.lower(), answer)

    def interactions(self, profile_item: Mapping[str, object]) -> tuple[Interaction, ...]:
        """Returns the training pairs of one official profile item: one, or none if a field is empty (or too short).

        Raises:
            KeyError: A field is missing.
            ValueError: A date does not parse.
        """
        made = self._pair(profile_item)
        if made is None:
            return ()
        time_s, until_s = date_span(profile_item.get("date"))
        item_id = str(profile_item.get("id", ""))
        return (Interaction(item_id, self.name, made[0], made[1], time_s, self.item_form, until_s=until_s),)

    def _pair(self, item: Mapping[str, object]) -> tuple[str, str] | None:
        source, target = (str(item[name] if item[name] is not None else "").strip() for name in self.fields)
        target = clean_rating(target) if self.kind == "rating" else self.spelled(target)
        return (source, target) if source and target else None

    def _template(self, form: str) -> str:
        if form not in self.instructions:
            raise ValueError(f"task {self.name} has no form {form!r}: it has {', '.join(self.instructions)}")
        return self.instructions[form]

    def _strip(self, text: str, form: str) -> str | None:
        before, after = self._template(form).split("{content}")
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
        if form == "query" and self._variant and (match := re.match(self._variant, text)):
            return text[match.end() :]
        return None

    def _show(self, item: Interaction, max_words: int) -> str:
        return self.history_item.format(input=_shorten(item.input, max_words), output=_shorten(item.output, max_words))


class _Citation(Task):
    """LaMP-1: the instruction stands inside the content, between the paper's title and the two references."""

    __slots__ = ()
    _MIDDLE = ", which reference is related? Just answer with [1] or [2] without explanation. "
    _BEFORE = "For an author who has written the paper with the title "
    _OPTIONS = ' [1]: "'

    def prompt(self, content: str, form: str = "query") -> str:
        """As `Task.prompt`; a content is `"title" [1]: "reference" [2]: "reference"`."""
        if form != "query":
            return Task.prompt(self, content, form)
        if content.startswith(self._BEFORE) and self._MIDDLE in content:
            return content
        title, found, options = content.partition(self._OPTIONS)
        return self._BEFORE + title + self._MIDDLE + (found + options).lstrip(" ")

    def _strip(self, text: str, form: str) -> str | None:
        if form != "query":
            return Task._strip(self, text, form)
        title, found, options = text.removeprefix(self._BEFORE).partition(self._MIDDLE)
        if not text.startswith(self._BEFORE) or not found:
            return None
        # A title that itself reads like the options could not be put back: such a text is kept whole.
        return f"{title} {options}" if options.startswith(self._OPTIONS[1:]) and self._OPTIONS not in title else None


class _Tweet(Task):
    """LaMP-7: a profile is bare tweets; a training pair is a tweet's first words and the rest."""

    __slots__ = ()

    def _pair(self, item: Mapping[str, object]) -> tuple[str, str] | None:
        words = str(item["text"] if item["text"] is not None else "").split()
        if len(words) < 3:
            return None
        cut = max(2, len(words) // 3)
        return " ".join(words[:cut]), " ".join(words[cut:])


def clean_rating(value: object) -> str:
    """Returns a rating as the official outputs write it: "5" for 5, "5" and "5.0"; anything else only stripped."""
    text = str(value).strip()
    return text.split(".")[0] if re.fullmatch(r"\d+\.0+", text) else text


def _shorten(text: str, max_words: int) -> str:
    words = text.split()
    return text if len(words) <= max_words else " ".join(words[:max_words])


_ABSTRACT = "Generate a title for the following abstract of a paper: {content}"
_CHOICE = ("accuracy", "macro_f1")
_ROUGE = ("rouge1", "rougeL")

_OFFICIAL: tuple[Task, ...] = (
    _Citation(
        "LaMP_1", "Citation identification", "classification", _CHOICE, "accuracy", 8,
        {"query": "{content}", "title": _ABSTRACT}, ("abstract", "title"), '"{output}"',
        labels=("[1]", "[2]"), item_form="title",
    ),
    Task(
        "LaMP_2", "Movie tagging", "classification", _CHOICE, "accuracy", 16,
        {"query": "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
                  f"further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: {{content}}"},
        ("description", "tag"), 'the tag for the movie: "{input}" is "{output}"', labels=MOVIE_TAGS,
        _variant=r"Which tag does this movie relate to among the following tags\? Just answer with the tag name "
                 r"without further explanation\. tags: \[[^\]]*\] description: ",
    ),
    Task(
        "LaMP_2N", "News categorization", "classification", _CHOICE, "accuracy", 16,
        {"query": "Which category does this article relate to among the following categories? Just answer with the "
                  f"category name without further explanation. categories: [{', '.join(NEWS_CATEGORIES)}] "
                  "article: {content}"},
        ("text", "category"), 'the category for the article: "{input}" is "{output}"', labels=NEWS_CATEGORIES,
        _variant=r"Which category does this article relate to among the following categories\? Just answer with the "
                 r"category name without further explanation\. categories: \[[^\]]*\] article: ",
    ),
    Task(
        "LaMP_3", "Product rating", "rating", ("mae", "rmse"), "mae", 4,
        {"query": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
                  "without further explanation. review: {content}"},
        ("text", "score"), '{output} is the score for "{input}"', labels=("1", "2", "3", "4", "5"),
    ),
    Task(
        "LaMP_4", "News headline", "generation", _ROUGE, "rouge1", 40,
        {"query": "Generate a headline for the following article: {content}"},
        ("text", "title"), '"{output}" is the title for "{input}"',
    ),
    Task(
        "LaMP_5", "Scholarly title", "generation", _ROUGE, "rouge1", 48,
        {"query": _ABSTRACT}, ("abstract", "title"), '"{output}" is a title for "{input}"',
        "{history}. Following the given patterns {query}",
    ),
    _Tweet(
        "LaMP_7", "Tweet paraphrasing", "generation", _ROUGE, "rouge1", 64,
        {"query": "Paraphrase the following tweet without any explanation before or after it: {content}",
         "complete": "Complete the following tweet from its first words: {content}"},
        ("text", "text"), '"{input} {output}"',
        "{history} are written by a person. Following the given patterns {query}",
        item_form="complete",
    ),
)  # fmt: skip

OFFICIAL = {task.name: task for task in _OFFICIAL}
"""The tasks that are built in, by name."""


def task_names() -> tuple[str, ...]:
    """Returns the names of all registered tasks, in order of registration."""
    return tuple(TASKS)


def get_task(name: str) -> Task:
    """Returns the task of a name ("LaMP_4", or with a dash: "LaMP-4").

    Raises:
        UserError: There is none; the message lists the known ones.
    """
    dashed = name.replace("-", "_")
    return TASKS.get(dashed if dashed in TASKS else name)


def rag_prompt(task: Task, items: Sequence[Interaction], content: str, max_words: int = 64) -> str:
    """Returns the query's prompt with history items before it, most relevant first, as the LaMP paper joins them.

    LaMP-1 adds the authors' other titles to the query's own; every other task puts `item, and item. ` before the query.
    Without items it is `task.prompt`.

    Args:
        task: The task.
        items: The retrieved items.
        content: The query's content.
        max_words: Most words of an item's input and of its output.
    """
    query = task.prompt(content)
    if not items:
        return query
    shown = ", and ".join(task._show(item, max_words) for item in items)
    if isinstance(task, _Citation):
        before, middle, rest = query.partition(_Citation._MIDDLE)
        return f"{before}, and {shown}{middle}{rest}"
    return task.history_frame.format(history=shown, query=query)
