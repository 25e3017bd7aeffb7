"""Everything that an experiment can name and a plug-in can register: one registry a kind, with its built-in things.

The comment beside each registry names the module that defines the kind; `docs/extending.md` shows one of each.
"""

from __future__ import annotations

from typing import Any

from untether.sim.core.registry import Entry, Registry

_FILTERS, _LINKS = "untether.clients.filters", "untether.sim.time.network.links"
_POLICIES, _METRICS = "untether.sim.time.policies", "untether.sim.evaluation.metrics"
_SOURCE = "untether.sim.population.source"
_LORA = "untether.strategies.lora"
_STARS = {"higher_is_better": False, "unit": "stars"}

# clients.filters: makes a Filter. `leak` is a verdict of the evaluator, the others are fields of `[filters]`.
FILTERS: Registry[Any] = Registry("filter", "filters.order", {
    "semantic": f"{_FILTERS}.semantic:Semantic", "diversity": f"{_FILTERS}.diversity:Diversity",
    "length": f"{_FILTERS}.length:Length", "adversarial": f"{_FILTERS}.adversarial:Adversarial",
    "self_consistency": f"{_FILTERS}.self_consistency:SelfConsistency", "human": f"{_FILTERS}.human:Human",
}, reserved=["leak", "order", "encoder"])  # fmt: skip

# sim.time.policies: whether a Case is due. `watches`: it reads the errors of the device's answers.
POLICIES: Registry[Any] = Registry("policy", "drift.policy", {
    **{name: f"{_POLICIES}:{name}" for name in ("every", "never", "when_online", "budget")},
    "on_drift": Entry(f"{_POLICIES}:on_drift", facts={"watches": True}),
}, facts={"watches": False})  # fmt: skip

# sim.time.policies: the place in a stream of errors at which they have risen.
DETECTORS: Registry[Any] = Registry("detector", "drift.detector", {
    name: f"{_POLICIES}:{name}" for name in ("adwin", "page_hinkley")
})  # fmt: skip

# sim.time.network.links: a device's Link, before what `[network]` takes from every kind.
LINKS: Registry[Any] = Registry("link", "network.kind", {
    name: f"{_LINKS}:configured" for name in ("always", "onoff", "trace")
})  # fmt: skip

# sim.population.source: makes a Population of an experiment and a seed.
POPULATIONS: Registry[Any] = Registry("population", "population.source", {
    "world": f"{_SOURCE}:FromWorld", "lamp": f"{_SOURCE}:FromFiles",
    "jsonl": "untether.sim.population.formats.jsonl:FromJsonl",
    "nodes": "untether.sim.population.formats.nodes:FromNodes",
})  # fmt: skip

# server.generator: makes a Generator of its options. `openai` is an endpoint that somebody else serves.
GENERATORS: Registry[Any] = Registry("generator", "cloud.provider", {
    name: f"untether.server.generator.factories:{name}"
    for name in ("world", "recombine", "transformers", "llama_cpp", "recorded")
}, beside=["openai"])  # fmt: skip

# strategies: makes a FleetStrategy. `shares`: devices train something together; `ranks`: theirs may differ; `averages`:
# what travels is averaged array by array, so that a strategy of Flower can take the mean's place.
STRATEGIES: Registry[Any] = Registry("strategy", "strategy.name", {
    "private": "untether.strategies.private:Private",
    **{
        name: Entry(f"{_LORA}.{name}:{made}", facts={"shares": True, **facts})
        for name, made, facts in (
            ("fedit", "FedIT", {"averages": True}), ("fedprox", "FedProxLora", {"averages": True}),
            ("ffa", "FFA", {"averages": True}), ("rolora", "RoLoRA", {}), ("fedsa", "FedSA", {"averages": True}),
            ("flora", "FLoRA", {"ranks": True}), ("hetlora", "HetLoRA", {"ranks": True}),
            ("flexlora", "FlexLoRA", {"ranks": True}), ("fedex", "FedEx", {}), ("dual", "Dual", {"averages": True}),
            ("fedalt", "FedALT", {}),
        )
    },
}, facts={"shares": False, "ranks": False, "averages": False})  # fmt: skip

# sim.rounds.selection: who takes part in a round of training together.
SELECTIONS: Registry[Any] = Registry("selection", "strategy.select", {
    name: f"untether.sim.rounds.selection:{name}"
    for name in ("all", "random", "available", "stalest_first", "least_data_first", "within_budget")
})  # fmt: skip

# sim.rounds.tracking: makes a Tracker of a run directory.
TRACKERS: Registry[Any] = Registry("tracker", "engine.track", {
    name: f"untether.sim.rounds.tracking:{made}"
    for name, made in (("tensorboard", "TensorBoard"), ("mlflow", "MLflow"), ("wandb", "WeightsAndBiases"))
})  # fmt: skip

# sim.studies.analysis: writes a study's table, figures and findings.
ANALYSES: Registry[Any] = Registry("analysis", "analysis", {
    "gain": "untether.sim.studies.gain:analyse",
    "tune": "untether.sim.studies.tuning:analyse",
    "scale": "untether.sim.studies.scale.scale:analyse",
    "connectivity": "untether.sim.studies.connectivity.connectivity:analyse",
    "drift": "untether.sim.studies.drift.drift:analyse",
    "sharing": "untether.sim.studies.sharing:analyse",
    "away": "untether.sim.studies.drift.away:analyse",
    **{name: f"untether.sim.studies.claims.{name}:analyse" for name in ("hardware", "rank", "filters")},
})  # fmt: skip

# sim.population.tasks: a Task.
TASKS: Registry[Any] = Registry("task", "population.tasks", "untether.sim.population.tasks:OFFICIAL", values=True)

# sim.evaluation.metrics: the score of one answer, from 0 to 1 (or in stars), of what was predicted and what is right.
# Macro-F1 and RMSE belong to a set of answers.
METRICS: Registry[Any] = Registry("metric", "", {
    **{name: f"{_METRICS}:{name}" for name in ("accuracy", "rouge1", "rougeL")},
    "mae": Entry(f"{_METRICS}:mae", facts=_STARS),
}, reserved=["macro_f1", "rmse"], facts={"higher_is_better": True, "unit": ""}, values=True)  # fmt: skip

# sim.time.hardware: a table of figures, or what makes a Profile when it is first asked for.
PROFILES: Registry[Any] = Registry("profile", "hardware.profiles", "untether.sim.time.hardware:profiles", values=True)

# sim.time.cost: a ModelShape.
MODELS: Registry[Any] = Registry("model", "hardware.nominal_model", "untether.sim.time.cost:SHAPES", values=True)

NAMED = (FILTERS, POLICIES, DETECTORS, LINKS, POPULATIONS, GENERATORS, STRATEGIES, SELECTIONS, TRACKERS)
"""Those whose names stand in a field as they are: an experiment is checked for them, and they may take settings."""
