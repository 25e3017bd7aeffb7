"""How often the 95% intervals of `summary.json` hold the truth, and how often p is below 5% where nothing differs.

    python -m bench.coverage [--replications 500] [--levels 0.3 1.3] [--ignore-clusters]

Populations are drawn whose true scores are known in closed form: whether an answer is right, and how wrong it is,
follows a normal variable that is the sum of an arm's level, what a cluster of users has in common (in all arms, and
in each arm alone), what is a user's own, and chance. Users share 24 archetypes drawn anew each time, or each is like
nobody else, as LaMP's are. Every replication goes through `sim.evaluation.statistics.summarize`, as a run's tables do.
`frozen` and `local` are equally good, `collaborative` is better. Prints a Markdown table, a row a population. One core.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtr

from untether.sim.core.seeding import generator
from untether.sim.evaluation.statistics import summarize
from untether.sim.population.tasks import get_task

ARCHETYPES = 24
GAIN = 0.3  # of `collaborative`, on the normal variable's scale
COMMON, COMMON_BY_ARM, OWN = 0.5, 0.3, 0.5  # standard deviations; chance has 1
QUERIES = (3, 7)  # of a user, least and most
CUTS = np.array([-1.2, -0.6, 0.0, 0.6])  # between the five grades of an answer, the worst first
TITLES = ("e f g h", "b a x y", "a b x y", "a c b d", "a b c d")  # against "a b c d"
ROUGE = {"rouge1": (0.0, 0.5, 0.5, 1.0, 1.0), "rougeL": (0.0, 0.25, 0.5, 0.75, 1.0)}
POPULATIONS = tuple((users, alike) for alike in (True, False) for users in (12, 60, 180))
TASKS = ("LaMP_2N", "LaMP_3", "LaMP_4")
LABELS = get_task("LaMP_2N").labels
SAID = (*LABELS, "no label")


@dataclass(frozen=True)
class Fleet:
    """How many users, whether they share archetypes, and how good the worse arms are."""

    users: int
    alike: bool
    level: float = 0.3

    @property
    def arms(self) -> dict[str, float]:
        return {"frozen": self.level, "local": self.level, "collaborative": self.level + GAIN}


def draw(fleet: Fleet, tasks: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    """One population's `predictions`."""
    cluster = rng.integers(0, ARCHETYPES, fleet.users) if fleet.alike else np.arange(fleet.users)
    count = int(cluster.max()) + 1
    frames = []
    for task in tasks:
        user = np.repeat(np.arange(fleet.users), rng.integers(QUERIES[0], QUERIES[1] + 1, fleet.users))
        own = rng.normal(0, COMMON, count)[cluster] + rng.normal(0, OWN, fleet.users)
        gold = _golds(rng, cluster, user) if task == "LaMP_2N" else np.zeros(len(user), dtype=int)
        for arm, level in fleet.arms.items():
            lean = own + rng.normal(0, COMMON_BY_ARM, count)[cluster]
            good = level + lean[user] + rng.normal(0, 1, len(user))
            frames.append(pd.DataFrame({
                "seed": 1, "round": 0, "device_id": user, "user_id": user, "cluster": cluster[user], "arm": arm,
                "task": task, "query_id": np.arange(len(user)), **_answers(task, good, gold, rng),
            }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def truth(task: str, metric: str, level: float) -> float:
    """What infinitely many users would score."""
    spread = np.sqrt(1 + COMMON**2 + COMMON_BY_ARM**2 + OWN**2)
    if metric in ("accuracy", "macro_f1"):
        right = float(ndtr(level / spread))
        return right if metric == "accuracy" else _macro_f1(right)
    grades = np.diff(np.concatenate([[0.0], ndtr((CUTS - level) / spread), [1.0]]))
    stars = np.arange(4, -1, -1)
    if metric in ROUGE:
        return float(grades @ np.array(ROUGE[metric]))
    return float(grades @ stars) if metric == "mae" else float(np.sqrt(grades @ stars**2))


def measure(
    fleet: Fleet, replications: int, tasks: Sequence[str] = TASKS, seed: int = 0, resamples: int = 400,
    ignore: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Shares of the replications, by what was looked at: "accuracy" and "accuracy difference" held by the interval,
    "accuracy p" below 5% where nothing differs, and so on. `ignore`: each user is taken for a cluster.
    """
    held: dict[str, list[bool]] = defaultdict(list)
    known = {
        (task, metric, arm): truth(task, metric, level)
        for task in tasks for metric in get_task(task).metrics for arm, level in fleet.arms.items()
    }  # fmt: skip
    pairs = [("collaborative", "frozen"), ("local", "frozen")]
    for number in range(replications):
        rng = generator(seed, "coverage", fleet.users, fleet.alike, round(100 * fleet.level), number)
        answers = draw(fleet, tasks, rng)
        answers = answers.drop(columns="cluster") if ignore else answers
        for row in summarize(answers, contrasts=pairs, seed=number, resamples=resamples):
            arm, reference, metric = row["arm"], row["reference"], row["metric"]
            true = known[row["task"], metric, arm]
            if (arm, reference) == ("collaborative", None):
                held[metric].append(row["ci_low"] <= true <= row["ci_high"])
            elif (arm, reference) == pairs[0]:
                true -= known[row["task"], metric, reference]
                held[f"{metric} difference"].append(row["diff_ci_low"] <= true <= row["diff_ci_high"])
            elif (arm, reference) == pairs[1]:
                held[f"{metric} p"].append(row["p"] <= 0.05)
    return {name: float(np.mean(values)) for name, values in held.items()}


def _weights() -> np.ndarray:
    weights = 1 / np.arange(1, len(LABELS) + 1) ** 0.7
    return weights / weights.sum()


def _wrong() -> np.ndarray:
    """How often each of `SAID` is said by mistake; a label that would be right makes place for the next one."""
    return np.append(0.9 * _weights(), 0.1)


def _golds(rng: np.random.Generator, cluster: np.ndarray, user: np.ndarray) -> np.ndarray:
    """A label an answer: clusters have labels of their own that they ask about."""
    upto = rng.dirichlet(10 * _weights(), int(cluster.max()) + 1).cumsum(1)[cluster][user]
    return np.minimum((rng.random(len(user))[:, None] > upto).sum(1), len(LABELS) - 1)


def _answers(task: str, good: np.ndarray, gold: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if task == "LaMP_2N":
        wrong = rng.choice(len(SAID), len(good), p=_wrong())
        wrong = np.where(wrong == gold, (gold + 1) % len(LABELS), wrong)
        said = np.where(good > 0, gold, wrong)
        return {"prediction": np.array(SAID, dtype=object)[said], "gold": np.array(LABELS, dtype=object)[gold]}
    grade = np.searchsorted(CUTS, good)
    if task == "LaMP_3":
        return {"prediction": np.array(["5", "4", "3", "2", "1"], dtype=object)[grade], "gold": np.full(len(good), "1")}
    return {"prediction": np.array(TITLES, dtype=object)[grade], "gold": np.full(len(good), TITLES[-1])}


def _macro_f1(right: float) -> float:
    said = np.tile(_wrong(), (len(LABELS), 1))
    for label in range(len(LABELS)):
        said[label, (label + 1) % len(LABELS)] += said[label, label]
        said[label, label] = 0.0
    joint = _weights()[:, None] * (right * np.eye(*said.shape) + (1 - right) * said)
    hits = np.diag(joint)
    return float(np.mean(2 * hits / (joint.sum(1) + joint.sum(0)[:-1])))


def show(found: dict[Fleet, dict[str, float]]) -> str:
    """The table."""
    metrics = [metric for task in TASKS for metric in get_task(task).metrics]
    lines = []
    for kind, title in (("", "mean"), (" difference", "difference"), (" p", "p below 5%")):
        lines += ["", f"| {title} | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
        for fleet, shares in found.items():
            who = f"{fleet.users} users, {'24 archetypes' if fleet.alike else 'each alone'}, level {fleet.level:g}"
            lines.append(f"| {who} | {' | '.join(f'{100 * shares[metric + kind]:.1f}' for metric in metrics)} |")
    return "\n".join(lines[1:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--levels", type=float, nargs="*", default=[0.3, 1.3], help="of the worse arms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-clusters", action="store_true", help="take all users for independent")
    options = parser.parse_args()
    begun = time.perf_counter()
    fleets = [Fleet(users, alike, level) for level in options.levels for users, alike in POPULATIONS]
    found = {
        fleet: measure(fleet, options.replications, seed=options.seed, ignore=options.ignore_clusters)
        for fleet in fleets
    }
    print(f"{options.replications} replications, {time.perf_counter() - begun:.0f} s. Percent.\n\n{show(found)}")


if __name__ == "__main__":
    main()
