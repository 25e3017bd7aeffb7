"""LongLaMP's files as lines of JSON: abstracts, product reviews and posts, long texts in their author's style.

Source: Kumar et al., 2024, arXiv 2407.11016; the columns of the Parquet files of `LongLaMP/LongLaMP` on the Hugging
Face Hub. A line is a question, a whole instruction already, with its user's profile; a profile's items are shaped like
the questions here. Nothing is dated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untether.sim.core.errors import UserError
from untether.sim.population.formats.convert import Record, read_records


@dataclass(frozen=True)
class Kind:
    """One of the benchmark's tasks: whose a line is, and how a profile's item becomes a question and its answer."""

    task: str
    user: str
    asks: str
    answer: str
    columns: tuple[str, ...]


KINDS = (
    Kind("longlamp_abstract", "name", 'Generate an abstract for the title "{title}"', "abstract", ("title",)),
    Kind(
        "longlamp_review", "reviewerId",
        'Generate the review text written by a reviewer who has given an overall rating of "{overall}" for a product '
        'with description "{description}". The summary of the review text is "{summary}"',
        "reviewText", ("overall", "description", "summary"),
    ),
    Kind("longlamp_topic", "author", 'Generate the content for a post from its summary "{summary}"', "content",
         ("summary",)),
)  # fmt: skip
"""By the column that names the user, which only one of them has."""


def from_longlamp(file: Path) -> Iterator[Record]:
    """Yields each user's profile, once, and each question, of a Parquet file or of lines of JSON.

    Raises:
        UserError: The file cannot be read, or a line lacks a column of its task.
    """
    told: set[tuple[str, str]] = set()
    for number, line in enumerate(_lines(file), 1):
        where = f"{file}, line {number}"
        kind = next((kind for kind in KINDS if kind.user in line), None)
        if kind is None or not {"input", "output", "profile"} <= line.keys():
            known = ", ".join(f"`{kind.user}`" for kind in KINDS)
            raise UserError(f"{where}: not LongLaMP's: it needs input, output, profile and one of {known}")
        user = str(line[kind.user])
        for place, item in enumerate(_items(line["profile"])):
            row = _pair(f"{where}, profile item {place}", kind, item)
            name = _digest(row["input"], row["output"])
            if (user, name) not in told and row["output"].strip():
                told.add((user, name))
                yield {"user": user, "id": name, "task": kind.task, "split": "history", **row}
        name = _digest(str(line["input"]), str(line["output"]))
        yield {"user": user, "id": f"q-{name}", "task": kind.task, "split": "query", "input": str(line["input"]),
               "output": str(line["output"])}  # fmt: skip


def longlamp_task(task: str) -> str:
    """Returns the table `[task]` for what `from_longlamp` makes, as TOML."""
    title = {"longlamp_abstract": "Abstracts", "longlamp_review": "Product reviews", "longlamp_topic": "Posts"}[task]
    return f'[task]\nname = "{task}"\ntitle = "LongLaMP: {title}"\nmax_new_tokens = 256\n'


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    if file.suffix != ".parquet":
        yield from read_records(file)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _items(profile: Any) -> list[Mapping[str, Any]]:
    """A profile is a list of items, or columns of equal length."""
    if isinstance(profile, Mapping):
        return [dict(zip(profile, values, strict=True)) for values in zip(*profile.values(), strict=True)]
    return list(profile or ())


def _pair(where: str, kind: Kind, item: Mapping[str, Any]) -> dict[str, str]:
    for column in (*kind.columns, kind.answer):
        if column not in item:
            raise UserError(f"{where}: no `{column}`, which {kind.task} has")
    asked = kind.asks.format(**{column: str(item[column] or "").strip() for column in kind.columns})
    return {"input": asked, "output": str(item[kind.answer] or "").strip()}


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
