"""The report's sentences, made from the numbers: the answer, what it rests on, and what a reader must not overlook.

A negative or an unclear result is printed as plainly as a positive one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import CONTRASTS, METHOD, NON_INFERIORITY, PRIMARY
from untether.sim.report.summary import Contrast, Summary, amount, interval, metric_name, number, p_value

_FEW_USERS = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer in one line, then in full sentences."""

    headline: str
    sentences: tuple[str, ...]


def answer(summary: Summary) -> Answer:
    """Does the cloud's help pay? The primary contrasts first, then how close the device comes to the cloud."""
    against = {pair: [c for c in summary.contrasts() if (c.arm, c.reference) == pair] for pair in CONTRASTS}
    sentences = []
    for pair in PRIMARY:
        what = f"{CONTRASTS[pair].words} ({pair[1]})"
        if against[pair]:
            sentences.append(_against(against[pair], what))
        else:
            missing = [arm for arm in pair if arm not in summary.arms]
            why = f"{' and '.join(missing)} did not run" if missing else "the summary holds no such contrast"
            sentences.append(f"Whether it beats {what} cannot be told: {why}.")
    sentences += [_close_to_cloud(against[pair]) for pair in NON_INFERIORITY if against[pair]]
    return Answer(_headline(*(against[pair] for pair in PRIMARY)), tuple(sentences))


def _headline(local: list[Contrast], placebo: list[Contrast]) -> str:
    if not local or not placebo:
        return "This run does not hold both primary contrasts, so it cannot answer whether the cloud's help pays."
    tasks = list(dict.fromkeys(c.task for c in (*local, *placebo)))
    over_local, over_placebo = ({c.task for c in group if c.verdict() == "better"} for group in (local, placebo))
    lost = {c.task for c in (*local, *placebo) if c.verdict() == "worse"}
    both = over_local & over_placebo
    where = f"{len(both)} of {_several(len(tasks), 'task')}"
    if len(both) == len(tasks):
        text = "Collaborative beat both local training and the placebo"
        text += " on every task." if len(tasks) > 1 else f" on {_name(tasks[0])}."
    elif both:
        text = f"Collaborative beat both local training and the placebo on {where}."
    elif over_local:
        text = (f"Collaborative beat local training on {len(over_local)} of {_several(len(tasks), 'task')}, "
                "but nowhere beat the placebo as well: the gain is not shown to be personal.")  # fmt: skip
    else:
        text = "On no task was collaborative shown to beat local training with as many steps."
    if lost:
        text += f" It was worse than one of them on {_list(sorted(lost))}."
    return text


def _against(contrasts: list[Contrast], what: str) -> str:
    """One sentence a contrast: where it is better, where worse, where nothing was shown."""
    groups: dict[str, list[Contrast]] = {}
    for contrast in contrasts:
        groups.setdefault(contrast.verdict(), []).append(contrast)
    total = len(contrasts)
    better = groups.pop("better", [])
    if better:
        text = f"Against {what}, collaborative is better on {len(better)} of {_several(total, 'task')}: "
        text += "; ".join(map(_detail, better)) + "."
    elif total == 1:
        text = f"Against {what}, collaborative is not shown to be better."
    else:
        text = f"Against {what}, collaborative is shown to be better on none of {_several(total, 'task')}."
    weak = "but the test does not hold after Holm's correction, on"
    for verdict, words in (
        ("worse", "It is worse on"),
        ("better, not after Holm", f"The interval favours it, {weak}"),
        ("worse, not after Holm", f"The interval is against it, {weak}"),
        ("no difference shown", "No difference was shown on"),
        ("cannot be told", "There are too few users to tell on"),
    ):
        if groups.get(verdict):
            text += f" {words} " + "; ".join(map(_detail, groups[verdict])) + "."
    return text


def _close_to_cloud(contrasts: list[Contrast]) -> str:
    fine = [c for c in contrasts if c.verdict().startswith(("better", "not worse"))]
    worse = [c for c in contrasts if c.verdict() == "worse"]
    open_ = [c for c in contrasts if c not in fine and c not in worse]
    found = [
        f"{words} {_list([c.task for c in group])}"
        for words, group in (
            *((f"not worse by more than {limit} on", group) for limit, group in _by_margin(fine).items()),
            ("worse on", worse),
            ("undecided on", open_),
        )
        if group
    ]
    return f"Against asking the cloud model itself, with the history in its prompt: {'; '.join(found)}."


def _by_margin(contrasts: list[Contrast]) -> dict[str, list[Contrast]]:
    groups: dict[str, list[Contrast]] = {}
    for contrast in contrasts:
        if contrast.margin is not None:
            groups.setdefault(amount(contrast.margin, contrast.metric), []).append(contrast)
    return groups


def _detail(contrast: Contrast) -> str:
    around = interval(contrast.diff_ci_low, contrast.diff_ci_high, signed=True)
    difference = f"{metric_name(contrast.metric)} {number(contrast.diff, signed=True)} {around}"
    text = f"{_name(contrast.task)} ({difference}".rstrip()
    if contrast.p_holm is not None:
        p = p_value(contrast.p_holm)
        text += f", Holm p {p}" if p.startswith("<") else f", Holm p = {p}"
    return text + ")"


def scale(summary: Summary, experiment: Experiment) -> str:
    """Returns what the answer rests on: users, queries, seeds, models."""
    counted = {task: summary.users(task) for task in summary.tasks}
    users = sorted({count for count in counted.values() if count})
    queries = sum(
        max((row["n_queries"] for row in summary.rows if row["task"] == task and row.get("n_queries")), default=0)
        for task in summary.tasks
    )
    many = f"{users[0]} to {users[-1]} users a task" if len(users) > 1 else _several(users[0] if users else 0, "user")
    count = len(experiment.seeds)
    seeds = f"{count} seeds (each with its own users)" if count > 1 else "one seed"
    parts = [f"{_several(len(summary.tasks), 'task')}, {many}, {queries} held-out queries, {seeds}."]
    base = "the embedded model" if experiment.model.base == "embedded" else experiment.model.base
    parts.append(f"On the device: {base}, LoRA rank {experiment.lora.rank}.")
    return " ".join([*parts, f"In the cloud: {_cloud(summary, experiment)}."])


def _cloud(summary: Summary, experiment: Experiment) -> str:
    facts = summary.facts.get("cloud") or {}
    provider = facts.get("provider") or experiment.cloud.provider
    model = facts.get("model") or experiment.cloud.model
    known = {"world": "the embedded world's generator", "recombine": "the embedded recombiner"}
    name = known.get(provider, provider)
    return f"{model} ({name})" if model and model != provider and provider not in known else name


def notes(summary: Summary, experiment: Experiment, environment: Mapping[str, Any]) -> list[str]:
    """Returns what limits the answer. The run's own notes come last."""
    facts, found = summary.facts, []
    cloud = facts.get("cloud") or {}
    provider = cloud.get("provider") or experiment.cloud.provider
    if experiment.population.source == "world":
        found.append("These users are synthetic. The embedded world is a check of the mechanism: it shows whether the "
                     "method can work where preferences are known, not how well it works on people.")  # fmt: skip
    if provider == "recombine":
        found.append("No language model wrote the synthetic samples: the embedded generator recombined each user's own "
                     "items.")  # fmt: skip
    elif provider == "world" or cloud.get("wrote_by_language_model") is False:
        found.append("No language model wrote the synthetic samples: the embedded generator composed them by rule.")
    if provider == "world" and experiment.cloud.knowledge == "full":
        found.append('The cloud knew the users\' own archetypes (cloud.knowledge = "full"): an oracle, an upper bound.')
    if facts.get("order") == "unknown":
        found.append("Order unknown: the data carry no dates, so it is asserted that no scored item was trained on, "
                     "not that queries are later than what was.")  # fmt: skip
    found += _unseen(facts.get("unseen") or {})
    found += _silence(facts.get("answers") or {}, summary)
    found += _placebos(facts.get("placebos") or {})
    found += _cut(facts.get("context") or {})
    learners, devices = experiment.engine.learners, experiment.population.users
    if 0 < learners < devices:
        found.append(f"{learners:,} of {devices:,} devices a seed, drawn from it, really asked, trained and answered: "
                     "every score is theirs. The others asked, waited, paid and trained in virtual time, with answers "
                     "as long and samples as many as one of those had. What the fleet did counts them, what left a "
                     "device does not.")  # fmt: skip
    few = [task for task in summary.tasks if (summary.users(task) or 0) < _FEW_USERS]
    if few:
        found.append(f"Few users (under {_FEW_USERS}) on {_list(few)}: intervals are wide and a missing difference "
                     "means little.")  # fmt: skip
    if experiment.model.base == "embedded":
        found.append("The device's model is the small embedded one. Its scores stand for themselves and say nothing "
                     "about larger models' level.")  # fmt: skip
    if len(experiment.seeds) == 1:
        found.append("One seed: the spread between draws of users is not measured.")
    return found + [str(note) for note in facts.get("notes") or []]


def _unseen(counted: Mapping[str, Any]) -> list[str]:
    """Golds that the official ROUGE does not read, and the scores over any script."""
    found = []
    for task, facts in counted.items():
        scores = ", ".join(
            f"{arm} {number(score['rouge1'])} / {number(score['rougeL'])}" for arm, score in facts["rouge"].items()
        )
        found.append(f"{facts['unseen']} of {facts['golds']} golds on {_name(task)} are in letters that ROUGE's "
                     "official definition does not read (ASCII letters and digits alone), so they score near 0 "
                     f"whatever is answered. ROUGE-1 / ROUGE-L over words of any script: {scores}.")  # fmt: skip
    return found


def _silence(counted: Mapping[str, int], summary: Summary) -> list[str]:
    """What the cloud was asked for and did not give."""
    attempts, unusable, cut = (int(counted.get(name, 0)) for name in ("attempts", "unusable", "cut"))
    found = []
    if cut:
        found.append(f"{cut} of {_several(attempts, 'attempt')} at the cloud ended before the answer began: all of "
                     "cloud.max_tokens had gone into reasoning or nothing. Raise cloud.max_tokens, or turn the "
                     "model's thinking off.")  # fmt: skip
    if attempts and unusable > cut and unusable * 10 >= attempts:
        found.append(f"{unusable} of {_several(attempts, 'attempt')} at the cloud brought an answer that could not be "
                     "used.")  # fmt: skip
    silent = [c.task for pair in NON_INFERIORITY for c in summary.contrasts()
              if (c.arm, c.reference) == pair and c.diff is None and c.n_queries]  # fmt: skip
    if silent:
        found.append(f"The cloud model answered no question on {_list(silent)}, so nothing is said about how close the "
                     "device comes to it there.")  # fmt: skip
    return found


def _cut(counted: Mapping[str, int]) -> list[str]:
    """What lost its middle because it did not fit into the base model's context."""
    parts = [
        _several(count, word)
        for name, word in (("examples_cut", "training example"), ("prompts_cut", "prompt"))
        if (count := int(counted.get(name, 0)))
    ]
    if not parts:
        return []
    return [f"{' and '.join(parts)} did not fit into the device's model and lost their middle: a base model with a "
            "longer context, fewer generation.rag_items or shorter texts would keep them whole."]  # fmt: skip


def _placebos(counted: Mapping[str, int]) -> list[str]:
    """How far the placebo's samples were one other user's."""
    made, of_two, short = (int(counted.get(name, 0)) for name in ("placebos", "placebos_of_two", "placebos_short"))
    samples, of_second = (int(counted.get(f"placebo_samples{name}", 0)) for name in ("", "_of_second"))
    if not made or not samples:
        return []
    text = "A placebo's samples were written for one other user"
    if of_two:
        text += (f"; {of_second / samples:.1%} of all of them ({of_two} of {_several(made, 'training')}) for a second "
                 "one, where the first had too few of a task")  # fmt: skip
    if short:
        text += f". In {short} of {_several(made, 'training')} both together had fewer than the device itself"
    return [text + "."]


def method(summary: Summary, experiment: Experiment) -> str:
    """Returns how the intervals and the p-values are made."""
    counted = sorted({count for task in summary.tasks if (count := summary.clusters(task))})
    many = f"{counted[0]} to {counted[-1]}" if len(counted) > 1 else str(counted[0]) if counted else ""
    alike = (
        f"users who share an archetype are alike, so they make one cluster (here {many})" if many and
        experiment.population.source == "world" else "each user is a cluster"
    )  # fmt: skip
    text = (
        "Queries are averaged to a user, then users are compared in pairs: mean paired difference. Intervals and p are "
        f"over clusters of users: {alike}. The interval is the jackknife's over clusters, with Student's t; p is of "
        "the permutation test that swaps the two arms within clusters; Holm is over tasks and the primary contrasts "
        f"({METHOD} against {' and '.join(reference for _, reference in PRIMARY)})."
    )
    margins = summary.margins()
    return f"{text} Against the cloud the margin is {' or '.join(margins)}." if margins else text


def captions(summary: Summary) -> dict[str, str]:
    """Returns what each figure shows."""
    margins = summary.margins()
    against = f"; against the cloud, not worse than the margin of {' or '.join(margins)} (dashed)" if margins else ""
    return {
        "contrasts": "Gain of the collaborative adapter over each reference, by task: mean over users and 95% "
        "interval; right of zero is better on every task. Filled points: significant after Holm's "
        f"correction{against}.",
        "filters": "What became of every synthetic sample asked of the cloud: accepted, rejected by a filter, or not "
        "received as a well-formed pair.",
        "users": "Every user a line: how the same user fares under each arm. Bold: the mean.",
        "gains": "Every user a point: what collaborative gives that user beyond the reference. Bar: the mean.",
        "learning": "Loss on the batch by optimizer step: median and quartiles over devices. It is of what each arm "
        "trains on, so arms with other data are not compared by it.",
        "outcomes": "Attempts at the cloud over virtual time, by what became of them.",
        "availability": "When devices had a link to the cloud: dark is up.",
    }


def _name(task: str) -> str:
    return task.replace("_", "-")


def _list(tasks: list[str]) -> str:
    names = [_name(task) for task in tasks]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
