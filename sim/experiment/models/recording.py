"""A cloud's answers as one file to publish: who wrote them, under which licence, each by the content of its request.

A request is known by what an endpoint sees of it (messages, sampling, seed), so whoever asks the same gets the same
answer, without the cloud. No history is in the file but as far as an answer repeats it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untether.sim.core import strict_json
from untether.sim.core.durable import write_atomically
from untether.sim.core.errors import UserError

FORMAT = 1
_ABOUT = "untether_recording"
_ANSWER = ("text", "refusal", "finish_reason", "tokens_in", "tokens_out")


def request_key(
    messages: Iterable[Mapping[str, Any]], temperature: float, top_p: float, max_tokens: int, seed: int
) -> str:
    """Returns what a request is known by: a digest of all that its answer depends on beside the model."""
    said = [[str(message.get("role")), message.get("content")] for message in messages]
    content = [FORMAT, said, float(temperature), float(top_p), int(max_tokens), int(seed)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Recording:
    """What a file holds.

    `model`: who wrote the answers, `model_licence` that model's; `licence`: of the answers, which may depend on the
    data that were shown; `note`: what else to know. `answers`: by `request_key`, with `text`, `refusal`,
    `finish_reason`, `tokens_in` and `tokens_out`.
    """

    model: str
    licence: str
    answers: Mapping[str, Mapping[str, Any]]
    model_licence: str = ""
    note: str = ""

    def write(self, path: Path) -> None:
        """Writes the file, gzipped where its name ends in .gz; the same content gives the same bytes."""
        about = {
            _ABOUT: FORMAT, "model": self.model, "model_licence": self.model_licence, "licence": self.licence,
            "note": self.note, "answers": len(self.answers),
        }  # fmt: skip
        rows = [about, *({"key": key, **self.answers[key]} for key in sorted(self.answers))]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        write_atomically(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Reads a file. Raises UserError, naming it and the line, for one that is none or is cut short."""
        try:
            raw = path.read_bytes()
            lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split("\n")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UserError(f"cloud.recording = `{path}` cannot be read: {error}") from None
        number, answers = 1, {}
        try:
            about = strict_json.loads(lines[0])
            if about[_ABOUT] != FORMAT:
                raise UserError(
                    f"cloud.recording = `{path}` is of format {about[_ABOUT]}, and this version reads {FORMAT}"
                )
            for line in filter(None, lines[1:]):
                number += 1
                row = strict_json.loads(line)
                answers[row["key"]] = {name: row[name] for name in _ANSWER}
            found = cls(about["model"], about["licence"], answers, about["model_licence"], about["note"])
            whole = about["answers"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"cloud.recording = `{path}`, line {number}: not what `untether cloud record` writes"
            ) from None
        if len(answers) != whole:
            raise UserError(f"cloud.recording = `{path}` is cut short: {len(answers)} of {whole} answers are there")
        return found
