"""From the answers that were paid for to a file that replays them."""

from __future__ import annotations

from pathlib import Path

from untether.clients.cloud.answer_cache import AnswerCache
from untether.sim.core.errors import UserError
from untether.sim.experiment.models.catalogue import catalogue
from untether.sim.experiment.models.recording import Recording


def record(cache: Path, licence: str, note: str = "") -> Recording:
    """Returns all answers of an answer cache as a recording.

    Raises UserError where there is no such cache, or nothing of one model in it.
    """
    if not cache.exists():
        raise UserError(f"{cache}: no such cache of answers. A run's is state/answers.sqlite, or its cloud.cache")
    opened = AnswerCache(cache)
    try:
        kept = opened.values()
    finally:
        opened.close()
    whole = [one for one in kept if "request" in one]
    models = sorted({one["attempt"]["model"] for one in whole if one["attempt"]["model"]})
    if len(models) != 1:
        found = ", ".join(models) or "none"
        raise UserError(f"{cache}: a recording is of one model, and these answers are of: {found}. Give another cache")
    answers = {
        one["request"]: {
            **{name: one["answer"][name] for name in ("text", "refusal", "finish_reason")},
            **{name: one["attempt"][name] for name in ("tokens_in", "tokens_out")},
        }
        for one in whole
    }  # fmt: skip
    known = catalogue().get(models[0])
    return Recording(models[0], licence, answers, known.licence if known else "", note)
