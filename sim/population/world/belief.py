"""Inference about a user: the belief of a reader who knows (some of) the world's archetypes, after seeing a few items.

Choices: a mixture over the known archetypes, each with quirks, updated in closed form. Weights: particles (archetype
plus quirks) weighted by their likelihood. Without known archetypes the priors are flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from untether.sim.population.world.base import Evidence, WorldTask
from untether.sim.population.world.persona import ARCHETYPES, QUIRK, Taste, Traits, archetype, stream

KNOWLEDGE = {
    "none": (),
    "pretraining": ARCHETYPES["pretraining"],
    "full": ARCHETYPES["validation"] + ARCHETYPES["evaluation"],
}
SLIP = 0.03  # how often an item may contradict its writer's habit
PARTICLES = 3072


def infer(task: WorldTask, evidence: Sequence[Evidence], knowledge: str = "pretraining") -> Taste:
    """Returns the likeliest choices and the mean weights of the persona behind `evidence`."""
    traits = task.traits
    return Taste(_choices(traits, evidence, knowledge), _weights(task, evidence, knowledge))


def _choices(traits: Traits, evidence: Sequence[Evidence], knowledge: str) -> tuple[int, ...]:
    if not traits.choices:
        return ()
    prior = _prior(traits, knowledge)  # [archetypes, dimensions, values]
    log_seen = np.zeros(prior.shape[1:])
    for item in evidence:
        for dimension, values in item.choices:
            log_seen[dimension] += np.log(SLIP)
            log_seen[dimension, list(values)] -= np.log(SLIP)
    joint = prior * np.exp(log_seen)
    by_dimension = joint.sum(axis=2)  # [archetypes, dimensions]
    log_weight = np.log(by_dimension).sum(axis=1)
    weight = np.exp(log_weight - log_weight.max())
    share = np.einsum("a,adv->dv", weight / weight.sum(), joint / by_dimension[:, :, None])
    return tuple(int(v) for v in share.argmax(axis=1))


def _weights(task: WorldTask, evidence: Sequence[Evidence], knowledge: str) -> tuple[float, ...]:
    if not task.traits.weights:
        return ()
    particles = _particles(task.traits, knowledge)
    log_weight = task.log_likelihood(evidence, particles)
    weight = np.exp(log_weight - log_weight.max())
    return tuple((weight / weight.sum() @ particles).tolist())


@cache
def _prior(traits: Traits, knowledge: str) -> np.ndarray:
    known = KNOWLEDGE[knowledge]
    counts = [count for _, _, count in traits.choices]
    prior = np.zeros((max(1, len(known)), len(counts), max(counts)))
    for d, count in enumerate(counts):
        prior[:, d, :count] = (QUIRK if known else 1.0) / count
        for a, index in enumerate(known):
            prior[a, d, archetype(traits, index).choices[d]] += 1 - QUIRK
    return prior


@cache
def _particles(traits: Traits, knowledge: str) -> np.ndarray:
    rng = np.random.default_rng(stream("particles", traits.task, knowledge).getrandbits(63))
    mean, spread, quirk = (np.array([w[i] for w in traits.weights]) for i in (1, 2, 3))
    known = KNOWLEDGE[knowledge]
    noise = rng.standard_normal((PARTICLES, len(mean)))
    if not known:
        return mean.mean() + noise * np.hypot(spread, quirk)
    centers = np.array([archetype(traits, index).weights for index in known])
    return centers[np.arange(PARTICLES) % len(known)] + noise * (quirk + 0.3 * spread)
