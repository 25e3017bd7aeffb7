"""What the table `events` says of devices: when their adapters came, what was wasted, how long the cloud let them wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

DEVICE = ["seed", "device_id"]
Z_95 = 1.959964


def trainings(events: pd.DataFrame, arm: str) -> pd.DataFrame:
    """One arm's trained adapters, a row each: seed, device_id, round, `on` (real, samples, stale_samples), `live_s`."""
    rows = events[(events["kind"] == "train") & (events["arm"] == arm) & (events["outcome"] == "ok")]
    on = rows["detail"].str.extract(r"^on (\w+)")[0]
    return rows[[*DEVICE, "round"]].assign(on=on, live_s=rows["time_s"] + rows["duration_s"]).reset_index(drop=True)


def first_live(made: pd.DataFrame, devices: pd.DataFrame, end_s: float) -> pd.DataFrame:
    """When each device (rows of seed and device_id) had the first of the adapters `made`: `time_s`, and `seen`, false
    where that was not before `end_s` (`time_s` is then `end_s`: censored).
    """
    first = made.groupby(DEVICE)["live_s"].min().rename("time_s").reset_index()
    found = devices[DEVICE].drop_duplicates().merge(first, how="left", on=DEVICE)
    seen = found["time_s"] < end_s
    return found.assign(time_s=found["time_s"].where(seen, end_s), seen=seen)


def survival(times_s: Sequence[float], seen: Sequence[bool]) -> pd.DataFrame:
    """Kaplan and Meier (JASA 1958): a row an event time, with the share that is still without (`share`) right after it
    and the 95% interval `low`, `high` on the log-log scale from Greenwood's variance. Begins with time 0, share 1.

    `seen` false: censored then. Where an event and a censoring meet, the event comes first.
    """
    times, happened = np.asarray(times_s, dtype=float), np.asarray(seen, dtype=bool)
    rows, share, variance = [(0.0, 1.0, 1.0, 1.0)], 1.0, 0.0
    for time_s in np.unique(times[happened]):
        at_risk, ended = int((times >= time_s).sum()), int((happened & (times == time_s)).sum())
        share *= 1 - ended / at_risk
        if share == 0:
            rows.append((float(time_s), 0.0, 0.0, 0.0))
            break
        variance += ended / (at_risk * (at_risk - ended))
        spread = Z_95 * np.sqrt(variance) / np.log(share)
        rows.append((float(time_s), share, share ** np.exp(-spread), share ** np.exp(spread)))
    return pd.DataFrame(rows, columns=["time_s", "share", "low", "high"])


def median_s(curve: pd.DataFrame) -> float:
    """When half of them have it; nan where that never comes."""
    below = curve[curve["share"] <= 0.5 + 1e-12]
    return float(below["time_s"].iloc[0]) if len(below) else np.nan


def wasted(events: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Bytes and energy a device, in all (`bytes`, `energy_j`) and of what came to nothing (`bytes_wasted`,
    `energy_wasted_j`): attempts to get samples, and trainings of `arm`, that did not end `ok`.
    """
    rows = events[(events["kind"] == "augment") | ((events["kind"] == "train") & (events["arm"] == arm))]
    failed = rows["outcome"] != "ok"
    moved = rows["bytes_up"].fillna(0) + rows["bytes_down"].fillna(0)
    energy = rows["energy_j"].fillna(0.0)
    counted = rows[DEVICE].assign(
        bytes=moved, bytes_wasted=moved.where(failed, 0), energy_j=energy, energy_wasted_j=energy.where(failed, 0.0)
    )
    return counted.groupby(DEVICE).sum().reset_index()


def queue_waits_s(events: pd.DataFrame) -> pd.Series:
    """Seconds in the cloud's queue, one a request for samples that reached the cloud, as many times as it did."""
    rows = events[events["kind"] == "augment"]
    queued = rows["detail"].fillna("").str.extract(r"queued ([\d.]+) s")[0].astype(float)
    reached = queued.notna() | (rows["tokens_in"].fillna(0) > 0)
    return queued[reached].fillna(0.0)
