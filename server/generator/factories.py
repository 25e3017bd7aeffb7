"""The factories of the built-in generators, called with the options of `untether cloud serve` or of an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from untether.server.generator import Generator, check_options
from untether.sim.core.errors import UserError
from untether.sim.experiment.sections import check_template_args


def recombine() -> Generator:
    """Returns a generator that recombines a history's own words, without any model."""
    from untether.server.generator.recombine import RecombineGenerator

    return RecombineGenerator()


def world(**options: Any) -> Generator:
    """Returns a generator that writes for the embedded world's users, and recombines texts of no world."""
    from untether.server.generator.fallback import WorldOrRecombine
    from untether.server.generator.world import WorldGenerator

    check_options("world", WorldGenerator, options)
    return WorldOrRecombine(WorldGenerator(**options))


def transformers(
    model: str, device: str = "", dtype: str = "auto", max_batch: int = 8, threads: int = 0,
    template_args: Mapping[str, Any] | str | None = None,
) -> Generator:  # fmt: skip
    """Returns a generator that runs a local causal language model (see `LocalModelGenerator`)."""
    from untether.server.generator.local_model import LocalModelGenerator  # late: it loads torch

    given = template_args or {}
    try:
        given = json.loads(given) if isinstance(given, str) else dict(given)
        check_template_args(given)
    except (ValueError, AttributeError) as error:
        raise UserError(f"option template_args = {template_args!r}: {error}; give a JSON object") from None
    return LocalModelGenerator(
        model, device=device, dtype=dtype, max_batch=max_batch, threads=threads, template_args=given
    )
