"""A finished run directory that nothing was run for."""

from __future__ import annotations

import numpy as np

from untether.sim.core.seeding import generator
from untether.sim.experiment import Experiment
from untether.sim.run.directory import RunDirectory

TASKS = {"LaMP_2": ("accuracy", "macro_f1"), "LaMP_3": ("mae", "rmse"), "LaMP_4": ("rouge1", "rougeL"),
         "LaMP_5": ("rouge1", "rougeL")}  # fmt: skip
_LEVEL = {"frozen": 0.40, "majority": 0.38, "rag": 0.43, "local": 0.47, "local_matched": 0.48, "placebo": 0.49,
          "unfiltered_matched": 0.52, "collaborative": 0.56, "cloud": 0.60}  # fmt: skip
_TRUTHS = ("good", "good", "good", "good", "hallucination", "off_topic", "duplicate", "verbose")
_CAUGHT = {"off_topic": ("semantic", 0.9), "duplicate": ("diversity", 0.95), "verbose": ("length", 0.8),
           "hallucination": ("semantic", 0.1), "good": ("semantic", 0.08)}  # fmt: skip
_SYSTEM = "You write <b>new</b> samples & nothing else."


def summary_row(task="LaMP_2", arm="collaborative", metric="accuracy", reference=None, mean=None, ci=(None, None),
                diff=None, diff_ci=(None, None), counts=(None, None, None), p=None, p_holm=None, n=24):  # fmt: skip
    return {
        "task": task, "arm": arm, "metric": metric, "reference": reference, "mean": mean, "ci_low": ci[0],
        "ci_high": ci[1], "diff": diff, "diff_ci_low": diff_ci[0], "diff_ci_high": diff_ci[1], "wins": counts[0],
        "ties": counts[1], "losses": counts[2], "p": p, "p_holm": p_holm, "n_users": n, "n_queries": 10 * n,
        "steps": 24.0, "tokens": 4096.0,
    }  # fmt: skip


def contrast_row(task, reference, diff, low, high, p_holm=None, metric="accuracy"):
    judged = reference == "cloud" and metric in ("accuracy", "mae", "rouge1")
    margin = {"margin": 0.1 if metric == "mae" else 0.02} if judged else {}
    return summary_row(task, metric=metric, reference=reference, diff=diff, diff_ci=(low, high), counts=(12, 4, 8),
                       p=None if p_holm is None else p_holm / 4, p_holm=p_holm) | margin  # fmt: skip


def synthetic_summary(rng: np.random.Generator, arms: tuple[str, ...]) -> dict:
    rows = []
    for index, (task, metrics) in enumerate(TASKS.items()):
        sign = -1 if task == "LaMP_3" else 1
        for metric in metrics:
            for arm in arms:
                if arm == "majority" and task in ("LaMP_4", "LaMP_5"):
                    continue
                mean = _LEVEL[arm] - 0.05 * index + rng.normal(0, 0.01) + (0.6 if sign < 0 else 0)
                rows.append(summary_row(task, arm, metric, mean=mean, ci=(mean - 0.04, mean + 0.04)))
            for reference, gain in (("local_matched", 0.06 - 0.025 * index), ("placebo", 0.05 - 0.02 * index),
                                    ("cloud", -0.005 - 0.02 * index)):  # fmt: skip
                low, high = sorted((sign * (gain - 0.025), sign * (gain + 0.025)))
                tested = reference != "cloud" and metric == metrics[0]
                rows.append(contrast_row(task, reference, sign * gain, low, high, metric=metric,
                                         p_holm=float(min(1.0, 0.002 * 6**index)) if tested else None))  # fmt: skip
    facts = {
        "exclusions": {"too little history (fewer than 3 items)": 7, "gold without a question": 1},
        "order": "time",
        "cloud": {"provider": "world", "model": "world", "wrote_by_language_model": False},
        "notes": ["Two requests were repeated after a 429."],
    }
    return {"rows": rows, "facts": facts}


def synthetic_run(path, users: int = 24, evil: str = "", **changes) -> RunDirectory:
    """A finished run directory without a run: seeded numbers through its own door; `evil` in all texts."""
    experiment = Experiment.model_validate({"name": "synthetic", "population": {"users": users}, **changes})
    run = RunDirectory.create(path, experiment)
    arms = tuple(arm for arm in experiment.arms if arm in _LEVEL)
    for seed in experiment.seeds:
        rng = generator(seed, "report fixture")
        tables = {name: [] for name in ("metrics", "events", "samples", "predictions", "ledger", "training")}
        for user in range(users):
            device, user_id = f"d{user:05d}", f"{seed}-{user}"
            for task, (metric, _) in TASKS.items():
                request = f"{device}-{task}"
                late = rng.random() < 0.08
                tables["events"].append({
                    "event_id": request, "request_id": request, "attempt": 0, "device_id": device, "arm": None,
                    "kind": "augment", "outcome": "rate_limited" if late else "ok",
                    "duration_s": float(rng.gamma(2, 0.6)),
                    "bytes_up": 2100, "bytes_down": 0 if late else 3300, "tokens_in": 520,
                    "tokens_out": 0 if late else 790, "time_s": 0.0,
                })  # fmt: skip
                for item in range(int(rng.integers(4, 9))):
                    tables["ledger"].append({"time_s": 0.0, "device_id": device, "request_id": request, "masked": 0,
                                             "item_id": f"{task}-{item}", "chars": 210, "tokens": 52})  # fmt: skip
                for index in range(0 if late else 22):
                    truth = str(rng.choice(_TRUTHS))
                    caught = _CAUGHT[truth]
                    verdict = f"rejected_by:{caught[0]}" if rng.random() < caught[1] else "accepted"
                    tables["samples"].append({
                        "sample_id": f"{request}-{index}", "request_id": request, "device_id": device,
                        "user_id": user_id, "task": task, "form": "query", "input": f"a film {evil}",
                        "output": f"comedy {evil}",
                        "semantic": 0.5, "diversity": 0.4, "length_ratio": 1.0, "verdict": verdict, "truth": truth,
                    })  # fmt: skip
                for arm in arms:
                    for query in range(3):
                        away = arm == "cloud" and rng.random() < 0.03
                        tables["predictions"].append({
                            "device_id": device, "user_id": user_id, "arm": arm, "task": task,
                            "query_id": f"{user_id}-{task}-{query}", "query_time_s": 1.0, "answered_time_s": 1.0,
                            "input": f"a film {evil}", "prediction": None if away else f"comedy{evil}",
                            "gold": "comedy",
                            "score": float(not away), "outcome": "no_answer" if away else "ok", "answered_by": arm,
                        })  # fmt: skip
                    tables["metrics"].append({"time_s": 1.0, "device_id": device, "user_id": user_id, "arm": arm,
                                              "task": task, "metric": metric, "n": 3,
                                              "value": 0.3 + 0.05 * ((7 * user + len(arm)) % 9)})  # fmt: skip
        parts = {name: [run.write_part(name, seed, 0, "0", rows)] for name, rows in tables.items()}
        run.commit(seed, 0, parts, {})
    run.merge(experiment)
    run.write_json("summary.json", synthetic_summary(generator(1, "summary"), arms))
    run.write_json("environment.json", {
        "packages": {"torch": "2.13.0", "flwr": "1.41.0"}, "hardware": {"cores": 2, "memory_gib": 8.0},
        "commit": "0123abcd", "started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T00:04:10Z",
        "prompts": {"augmentation": {"system": _SYSTEM, "user": "Here are 8 samples:"}},
        "models": {"base": "embedded", "cloud": "world"},
    })  # fmt: skip
    return run
