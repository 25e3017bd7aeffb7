"""The factories of the built-in generators, called with the options of `untether cloud serve` or of an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from untether.server.generator import Generator, check_options, create
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


def llama_cpp(
    model: str, context: int = 0, slots: int = 0, threads: int = 0,
    template_args: Mapping[str, Any] | str | None = None,
) -> Generator:  # fmt: skip
    """Yields a quantised model (GGUF) behind llama.cpp's server."""
    from untether.server.generator.llama_cpp import LlamaCppGenerator

    given = _template_args(template_args)
    return LlamaCppGenerator(model, context=context, slots=slots, threads=threads, template_args=given)


def recorded(path: str, otherwise: str = "", options: Mapping[str, Any] | None = None) -> Generator:
    """Yields a file of recorded answers; `otherwise` names the generator, made of `options`, of what is not in it."""
    from untether.server.generator.recorded import RecordedGenerator

    return RecordedGenerator(path, create(otherwise, options) if otherwise else None)


def transformers(
    model: str, device: str = "", dtype: str = "auto", max_batch: int = 8, threads: int = 0,
    template_args: Mapping[str, Any] | str | None = None,
) -> Generator:  # fmt: skip
    """Returns a generator that runs a local causal language model (see `LocalModelGenerator`)."""
    from untether.server.generator.local_model import LocalModelGenerator  # late: it loads torch

    return LocalModelGenerator(
        model, device=device, dtype=dtype, max_batch=max_batch, threads=threads,
        template_args=_template_args(template_args),
    )


def _template_args(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    try:
        found = json.loads(given) if isinstance(given, str) else dict(given or {})
        return check_template_args(found)
    except (ValueError, AttributeError) as error:
        raise UserError(f"option template_args = {given!r}: {error}; give a JSON object") from None
