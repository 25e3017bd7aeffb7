"""Generators, which write the cloud's answers: the interface, and the named ones behind `untether cloud serve`.

A generator gets what an OpenAI-compatible endpoint gets, chat messages and sampling parameters, and nothing else: no
user id, no ground truth, no other request. Named factories load lazily, so that serving one does not import the rest.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from untether.sim.core.errors import UserError
from untether.sim.core.kinds import GENERATORS
from untether.sim.experiment.plugins import resolved


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for one chat completion. `seed` and the other fields mean what they mean in OpenAI's API.

    `schema` is the JSON schema that the answer must follow; None where it may be any text.
    """

    messages: tuple[dict[str, Any], ...]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion. `finish_reason` is `stop`, `length` or `content_filter`; `refusal` replaces the text.

    `model` names the model that wrote this one, where that is not the generator as a whole (a fallback). `note` tells
    the caller what else it should know, such as what of the request was left out.
    """

    text: str
    tokens_in: int
    tokens_out: int
    finish_reason: str = "stop"
    refusal: str | None = None
    model: str | None = None
    note: str = ""


class PromptTooLong(ValueError):
    """The prompt leaves no space for an answer in the model's context."""


class NotRecorded(ValueError):
    """Only recorded answers are given, and none is of this request."""


class Generator(Protocol):
    """Writes completions. The same request (seed included) gets the same answer, in whatever batch it comes.

    Attributes:
        batched: Whether one call with many requests is cheaper than many calls (the gateway then gathers them).
        structured: Whether answers to a samples request are always JSON, so that a `response_format` can be honoured.
        fingerprint: Changes whenever the same request may be answered differently: code version, options, weights.

    A generator may also have `slots`, how many threads may call `generate` at once (otherwise one), `close()`, and
    `limit_s(max_tokens, waiting)`, how long a request may take where so many wait at once.
    """

    name: str
    model_id: str
    fingerprint: str
    batched: bool
    structured: bool

    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """Returns one completion a request, in order.

        Raises:
            NotARequest: The generator cannot read the messages (`sim.prompts.protocol.NotARequest`).
        """
        ...


def create(name: str, options: Mapping[str, Any] | None = None) -> Generator:
    """Returns the generator of a registered name.

    Args:
        name: The registered name.
        options: Keywords for its factory; or the fields of the section of settings that a plug-in registered it with.

    Raises:
        UserError: The name or an option is unknown; the message lists the known ones.
    """
    factory, options = GENERATORS.get(name), dict(options or {})
    if GENERATORS.settings(name) is not None:
        return GENERATORS.bind(name, resolved([name], {name: options}))()
    check_options(name, factory, options)
    return factory(**options)


def check_options(name: str, takes: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Checks options against the parameters of what takes them.

    Args:
        name: The generator, for messages.
        takes: Its factory.
        options: Keywords.

    Raises:
        UserError: An option is not accepted, or a required one is missing.
    """
    parameters = inspect.signature(takes).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # the factory passes them on, and checks them then
    unknown = [option for option in options if option not in parameters]
    if unknown:
        known = ", ".join(parameters) or "none"
        raise UserError(f"generator {name!r} has no option {unknown[0]!r}: its options are {known}")
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise UserError(f"generator {name!r} needs the option {option!r}")


def system_fingerprint(*parts: object) -> str:
    """Returns a short digest of everything that determines a generator's answers, like OpenAI's `system_fingerprint`.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return "fp_" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
