"""Answers that a cloud gave before, from a file of `untether cloud record`: a real cloud's words without the cloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from untether.server.generator import Completion, GenerationRequest, Generator, NotRecorded, system_fingerprint
from untether.sim.experiment.models.recording import Recording, request_key


class RecordedGenerator:
    """Replays a recording. What it does not have is an error, or for `other` to answer, whose completions say so.

    Raises UserError where the file is none.
    """

    name = "recorded"
    batched = False
    structured = True

    def __init__(self, path: str, other: Generator | None = None) -> None:
        self._path, self._other = Path(path).expanduser(), other
        self.recording = Recording.read(self._path)
        self.model_id = self.recording.model
        self.slots = getattr(other, "slots", 0)
        answers = sorted((key, row["text"]) for key, row in self.recording.answers.items())
        self.fingerprint = system_fingerprint("recorded", 1, self.model_id, answers, other.fingerprint if other else "")

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """As `Generator.generate`. Raises NotRecorded."""
        return [self._one(request) for request in batch]

    def close(self) -> None:
        """Ends whoever answers what is missing."""
        getattr(self._other, "close", lambda: None)()

    def limit_s(self, max_tokens: int, waiting: int) -> float:
        """Returns that of whoever answers what is missing."""
        limit = getattr(self._other, "limit_s", None)
        return limit(max_tokens, waiting) if limit else 0.0

    def _one(self, request: GenerationRequest) -> Completion:
        key = request_key(request.messages, request.temperature, request.top_p, request.max_tokens, request.seed)
        found = self.recording.answers.get(key)
        if found is not None:
            return Completion(
                found["text"], found["tokens_in"] or 0, found["tokens_out"] or 0, found["finish_reason"] or "stop",
                found["refusal"],
            )  # fmt: skip
        if self._other is None:
            raise NotRecorded(
                f"{self._path} has no answer to this request, so users, seed, prompts or fields of [cloud] differ from "
                "those that were recorded. Set them back, or say in cloud.otherwise who answers what is missing"
            )
        done = self._other.generate([request])[0]
        return replace(done, model=done.model or self._other.model_id)
