"""A generator for any text: the embedded world's for its own users, recombination for everybody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from untether.server.generator import Completion, GenerationRequest, Generator, system_fingerprint
from untether.server.generator.recombine import RecombineGenerator


class WorldOrRecombine:
    """The embedded cloud: the world's own generator for its text, recombination of the user's items for other text.

    A completion by recombination carries its model id, so that a report can say that no language model wrote it.
    """

    batched = False
    structured = True

    def __init__(self, world: Generator) -> None:
        self._world = world
        self._other = RecombineGenerator()
        self.name = world.name
        self.model_id = world.model_id
        self.fingerprint = system_fingerprint(world.fingerprint, self._other.fingerprint)

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """Returns completions as `Generator.generate` does, each request on its own."""
        return [self._one(request) for request in batch]

    def _one(self, request: GenerationRequest) -> Completion:
        from untether.server.generator.world import NotOfThisWorld

        try:
            return self._world.generate([request])[0]
        except NotOfThisWorld:
            return replace(self._other.generate([request])[0], model=self._other.model_id)
