"""The analysis `hardware`: what each device pays in storage, time, energy and memory, and under which assumptions it is
smaller and faster than the cloud.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from untether.sim.core.durable import write_atomically
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import METHOD
from untether.sim.report.figures import BLUE, FAINT, GREEN, ORANGE, VERMILION, style
from untether.sim.run.directory import RunDirectory
from untether.sim.studies.answer import save_figure, write_findings, write_table
from untether.sim.studies.frames import Runs, each_cell
from untether.sim.studies.study import Study
from untether.sim.time.cost import CostModel, model_shape
from untether.sim.time.devices.measured import CHECK, by_metric, read_measurements
from untether.sim.time.hardware import catalogue
from untether.sim.time.timeline import CHARS_PER_TOKEN

CLOUD_MODEL, CLOUD_BITS = "Qwen2.5-7B", 16
"""The model that the cloud would run."""

LESS_STORAGE, FASTER = 0.8, 3.0
"""The claims: storage falls by more than this share, answers come up to so many times faster."""

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B")
BITS = (16, 8, 4)
HISTORY = 1000
"""Tokens of history that the cloud needs in its prompt: it has no adapter of this user's."""

OVERHEAD = 500
"""Bytes of a message beside its text."""


class LinkSpeed(NamedTuple):
    """A link: Mbit/s down and up, round trip in seconds, and the wait in the cloud's queue."""

    down: float
    up: float
    rtt_s: float
    wait_s: float = 0.0


class PromptSize(NamedTuple):
    """A question: tokens read beside any history, and written."""

    read: int
    new: int


LINKS = {
    "Wi-Fi": LinkSpeed(100.0, 40.0, 0.02), "LTE": LinkSpeed(28.8, 10.0, 0.05), "3G": LinkSpeed(1.0, 0.4, 0.15),
    "LTE, busy cloud": LinkSpeed(28.8, 10.0, 0.05, 5.0),
}  # fmt: skip
"""LTE and 3G at the medians of the Ghent and Norway logs; the others are assumptions."""

PROMPTS = {"tag": PromptSize(128, 4), "headline": PromptSize(256, 16), "text": PromptSize(256, 128)}


def analyse(study: Study, out: Path, runs: Runs) -> None:
    """Writes the table (a row a device), `speed.csv` (a row a device, link and prompt), `storage.csv` (a row a model
    and precision), figures and findings.
    """
    devices = pd.DataFrame([measure(cell.experiment, run) for cell, run in each_cell(study, runs)])
    first = study.cells[0].experiment
    speeds = pd.concat([speed(cell.experiment) for cell in study.cells], ignore_index=True)
    stored = storage(first, float(devices["samples_mb"].max()))
    write_table(out, devices)
    for name, frame in (("speed", speeds), ("storage", stored)):
        text = io.StringIO()
        frame.to_csv(text, index=False, float_format="%.4f")
        write_atomically(out / f"{name}.csv", text.getvalue())
    save_figure(out, "1-devices", draw_devices(devices), "Training, energy, memory and decoding, by device")
    save_figure(out, "2-speed", draw_speed(speeds), "How many times sooner an answer is there than through the cloud")
    write_findings(study, out, findings(devices, speeds, stored), notes(first))


def cost_of(experiment: Experiment) -> CostModel:
    """Returns the cost model of an experiment's first profile, with the adapter of `collaborative`."""
    hardware = experiment.hardware
    profile = catalogue(hardware.catalogue)[hardware.profiles[0].partition(":")[0]]
    lora, _ = experiment.for_arm(METHOD)
    return CostModel(
        profile, model_shape(hardware.nominal_model), hardware.weight_bits, lora, hardware.gradient_checkpointing
    )


def measure(experiment: Experiment, run: RunDirectory) -> dict[str, object]:
    """Returns one device: what a training took in the run (medians over its users) and what the cost model says of the
    rest.
    """
    cost, events, samples = cost_of(experiment), run.read("events"), run.read("samples")
    profile = cost.profile
    trained = events[(events["kind"] == "train") & (events["arm"] == METHOD)]
    done = trained[trained["outcome"] == "ok"]
    text = samples["input"].str.len() + samples["output"].str.len()
    samples_mb = float(text.groupby([samples["seed"], samples["device_id"]]).sum().max()) / 1e6 if len(samples) else 0.0
    row = 256
    lean, hot = replace(cost, checkpointing=True), profile.heat().after(load_s=3600).speed
    energy_j = float(done["energy_j"].median()) if len(done) else np.nan
    return {
        "device": profile.name, "kind": profile.kind, "stored_mb": cost.stored_bytes(1, samples_mb * 1e6) / 1e6,
        "adapter_mb": cost.adapter_bytes() / 1e6, "samples_mb": samples_mb,
        "trained": len(done), "out_of_memory": int((trained["outcome"] == "out_of_memory").sum()),
        "train_s": float(done["duration_s"].median()) if len(done) else np.nan, "train_kj": energy_j / 1000,
        "battery": energy_j / (3600 * profile.battery_wh) if profile.battery_wh else np.nan,
        "memory_gb": cost.training_bytes(row) / 1e9, "lean_memory_gb": lean.training_bytes(row) / 1e9,
        "usable_gb": cost.usable_bytes / 1e9, "read_per_s": 256 / cost.prefill_s(256),
        "write_per_s": 1 / cost.token_s(256), "hot_write_per_s": hot / cost.token_s(256),
    }  # fmt: skip


def cloud_s(experiment: Experiment, link: LinkSpeed, prompt: PromptSize) -> float:
    """Seconds until the cloud's answer is there: two round trips for the connection, one for the question, the bytes
    both ways, the wait, and the cloud's work on question and history.
    """
    capacity, read = experiment.cloud.capacity, prompt.read + HISTORY
    up, down = (8 * (CHARS_PER_TOKEN * tokens + OVERHEAD) for tokens in (read, prompt.new))
    work_s = sum(
        tokens / rate
        for tokens, rate in ((read, capacity.prompt_tokens_per_s), (prompt.new, capacity.output_tokens_per_s)) if rate
    )
    return 3 * link.rtt_s + up / (1e6 * link.up) + down / (1e6 * link.down) + link.wait_s + work_s


def speed(experiment: Experiment) -> pd.DataFrame:
    """Returns how long one device and the cloud take to answer, by link and prompt: `times` the cloud's over the
    device's.
    """
    cost = cost_of(experiment)
    rows = []
    for (name, link), (what, prompt) in product(LINKS.items(), PROMPTS.items()):
        own_s, far_s = cost.decoding_s(*prompt), cloud_s(experiment, link, prompt)
        rows.append((cost.profile.name, cost.profile.kind, name, what, own_s, far_s, far_s / own_s))
    return pd.DataFrame(rows, columns=["device", "kind", "link", "prompt", "device_s", "cloud_s", "times"])


def storage(experiment: Experiment, samples_mb: float) -> pd.DataFrame:
    """Returns what a device keeps (base, adapter, synthetic samples) against the cloud model's weights, by model and
    bits.
    """
    cost = cost_of(experiment)
    far = replace(cost, model=model_shape(CLOUD_MODEL), weight_bits=CLOUD_BITS).weight_bytes
    rows = []
    for name, bits in product(dict.fromkeys((experiment.hardware.nominal_model, *MODELS)), BITS):
        here = replace(cost, model=model_shape(name), weight_bits=bits)
        kept = here.stored_bytes(1, samples_mb * 1e6)
        rows.append((name, bits, here.weight_bytes / 1e6, here.adapter_bytes() / 1e6, samples_mb, 1 - kept / far))
    return pd.DataFrame(rows, columns=["model", "bits", "base_mb", "adapter_mb", "samples_mb", "saved"])


def findings(devices: pd.DataFrame, speeds: pd.DataFrame, stored: pd.DataFrame) -> Iterator[str]:
    """Sentences that follow the numbers."""
    holds, fails = stored[stored["saved"] > LESS_STORAGE], stored[stored["saved"] <= LESS_STORAGE]
    least, most = stored["saved"].min(), stored["saved"].max()
    yield (
        f"Storage: base, adapter and synthetic samples take {least:.0%} to {most:.0%} less than {CLOUD_MODEL} in "
        f"{CLOUD_BITS} bits. More than {LESS_STORAGE:.0%} less: {_combinations(holds)}; not: {_combinations(fails)}."
    )
    for prompt, own in speeds.groupby("prompt", sort=False):
        best = own.loc[own["times"].idxmax()]
        parts = []
        for link, some in own.groupby("link", sort=False):
            sooner = some[some["times"] > 1]["device"].nunique()
            thrice = some[some["times"] >= FASTER]["device"].nunique()
            parts.append(f"over {link} on {sooner} ({thrice} at least {FASTER:g} times)")
        tokens = PROMPTS[str(prompt)]
        yield (
            f"Speed, {prompt} ({tokens.read} tokens read, {tokens.new} written): of {own['device'].nunique()} devices "
            f"the answer is sooner there than through the cloud {'; '.join(parts)}. "
            f"At most {best['times']:.1f} times, on {best['device']} over {best['link']}."
        )
    done = devices.dropna(subset=["train_s"]).sort_values("train_s")
    if len(done):
        quick, slow = done.iloc[0], done.iloc[-1]
        yield (
            f"Training a user's adapter takes {_time(quick['train_s'])} ({quick['device']}) to "
            f"{_time(slow['train_s'])} ({slow['device']}), and "
            f"{done['train_kj'].min():.2g} to {done['train_kj'].max():.2g} kJ above idle."
        )
        charged = done.dropna(subset=["battery"])
        if len(charged):
            worst = charged.loc[charged["battery"].idxmax()]
            yield f"It costs at most {worst['battery']:.1%} of a battery ({worst['device']})."
    short = devices[devices["memory_gb"] > devices["usable_gb"]]
    saved = short[short["lean_memory_gb"] <= short["usable_gb"]]
    yield (
        f"Training on rows of 256 tokens needs {devices['memory_gb'].max():.1f} GB, "
        f"{devices['lean_memory_gb'].max():.1f} GB with gradient checkpointing. "
        + (f"Too much for {', '.join(short['device'])}; with checkpointing it fits "
           f"{', '.join(saved['device']) or 'none'} of these." if len(short) else "It fits every device.")
    )  # fmt: skip


def notes(experiment: Experiment) -> Iterator[str]:
    """Yields what the numbers rest on."""
    found = by_metric([row for row in read_measurements() if row.part == CHECK])["all"]
    hardware = experiment.hardware
    yield (
        f"On the device: `{hardware.nominal_model}`, weights of {hardware.weight_bits} bits. The cloud reads "
        f"{HISTORY} tokens of history with every question, at `cloud.capacity`'s rates."
    )
    yield (
        f"The cost model is within a factor of {found.error:.2f} (median) and {found.spread:.2f} (geometric spread) of "
        f"{found.rows} published measurements that it was not fitted on (`python -m bench.devices`)."
    )


def draw_devices(devices: pd.DataFrame) -> Figure:
    """Draws four panels of bars on a shared list of devices, logarithmic."""
    order = devices.sort_values(["kind", "train_s"], ascending=[False, False])
    place = np.arange(len(order))
    with style():
        figure, axes = plt.subplots(1, 4, figsize=(7.2, 0.19 * len(order) + 0.9), sharey=True)
        for axis, column, colour, label in zip(
            axes, ("train_s", "train_kj", "memory_gb", "write_per_s"), (BLUE, ORANGE, GREEN, VERMILION),
            ("training (s)", "energy (kJ)", "training memory (GB)", "tokens written a second"), strict=True,
        ):  # fmt: skip
            axis.barh(place, order[column], color=colour, height=0.62)
            if column == "memory_gb":
                axis.plot(order["usable_gb"], place, "|", color=FAINT, markersize=8, markeredgewidth=1.6)
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_yticks(place, order["device"])
        figure.tight_layout()
    return figure


def draw_speed(speeds: pd.DataFrame) -> Figure:
    """Returns a panel a prompt, devices against the ratio of the cloud's time to theirs, a mark a link."""
    prompts, devices = list(dict.fromkeys(speeds["prompt"])), list(dict.fromkeys(speeds["device"]))[::-1]
    with style():
        figure, axes = plt.subplots(
            1, len(prompts), figsize=(7.2, 0.19 * len(devices) + 1.1), sharey=True, sharex=True, squeeze=False
        )
        for axis, prompt in zip(axes.flat, prompts, strict=True):
            for (link, own), colour, mark in zip(
                speeds[speeds["prompt"] == prompt].groupby("link", sort=False), (BLUE, GREEN, VERMILION, ORANGE),
                "os^D", strict=True,
            ):  # fmt: skip
                y = [devices.index(name) for name in own["device"]]
                axis.plot(own["times"], y, mark, color=colour, markersize=3.5, label=str(link))
            for line in (1.0, FASTER):
                axis.axvline(line, color=FAINT, linewidth=0.7, linestyle="-" if line == 1 else "--")
            axis.set_xscale("log")
            axis.set_title(prompt)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_yticks(range(len(devices)), devices)
        figure.supxlabel("seconds through the cloud over seconds on the device", fontsize=9)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _combinations(frame: pd.DataFrame) -> str:
    by_model = frame.groupby("model", sort=False)["bits"]
    return ", ".join(f"{model} in {' or '.join(map(str, bits))} bits" for model, bits in by_model) or "none"


def _time(seconds: float) -> str:
    for longest, size, unit in ((180, 1, "s"), (7200, 60, "min")):
        if seconds < longest:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
