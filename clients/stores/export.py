"""`untether export`: one device's private adapter as a PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.door.peft_format import save_peft
from untether.clients.engine.lora_layers import weight_of
from untether.clients.stores.adapter_store import AdapterStore, as_tensors
from untether.sim.core.errors import UserError, unknown
from untether.sim.core.learning import LoraSpec
from untether.sim.experiment.arms import ARMS, trained
from untether.sim.run.directory import RunDirectory


def export_adapter(run: RunDirectory, device: str, arm: str, out: Path, seed: int | None = None) -> Path:
    """Writes a device's adapter, as of the last round, as a PEFT folder.

    Raises:
        UserError: Device, arm or seed is not in the run; the message names those that are.
    """
    experiment = run.experiment
    if arm not in (there := trained(ARMS)):
        raise UserError(f"--arm: {unknown('arm with an adapter', arm, there)}")
    seed = experiment.seeds[0] if seed is None else seed
    store = AdapterStore(run.path, seed)
    state = store.load(experiment.rounds - 1, device, arm)
    if state is None:
        devices = store.devices(experiment.rounds - 1, arm)
        there = f"its devices run from {devices[0]} to {devices[-1]}" if devices else "it has no adapters of that arm"
        raise UserError(f"{run.path}: no adapter of device `{device}`, arm `{arm}`, seed {seed}; {there}")
    base = FrozenBase.load(resolve(experiment.model.base), dtype="float32", device="cpu")
    spec = LoraSpec.of(experiment.for_arm(arm)[0]).fitting(state)
    if odd := [name for name, array in state.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]:
        raise UserError(f"{store.root}: {odd[0]!r} of device `{device}` holds what are no numbers: it is damaged")
    AdapterStack.of_states(base, [spec], [as_tensors(state)])  # names and shapes are this base's
    save_peft(out, spec, as_tensors(state), base)
    lines = [
        f"LoRA adapter of device {device}, arm {arm}, seed {seed}, for {experiment.model.base}.",
        "It may hold what it was trained on: treat it as you would that user's data.",
        *merging_loses(base, spec, state),
    ]  # fmt: skip
    (Path(out) / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return out


def merging_loses(base: FrozenBase, spec: LoraSpec, state: Mapping[str, np.ndarray]) -> list[str]:
    """Returns what a merge of an adapter into its base's weights would lose, in sentences; none where it loses nothing.

    Args:
        base: The base, in float32.
        spec: The adapter's shape.
        state: Its arrays under PEFT's keys.
    """
    notes, kept, changed = [], 0, 0
    for key in (key for key in state if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
        weight = weight_of(base.routing.names[name]).float()
        A, B = (torch.from_numpy(np.array(state[key.replace("lora_A", side)])).float() for side in ("lora_A", "lora_B"))
        delta = spec.scaling * (B @ A)
        kept += int(((weight + delta).bfloat16() != weight.bfloat16()).sum())
        changed += int((delta != 0).sum())
    if changed and kept < 0.9 * changed:
        notes.append(
            f"Merged into bfloat16 weights, only {kept / changed:.0%} of the weights that it changes would change: the "
            "rest of its effect is below their precision. Merge in float32, or keep the adapter apart."
        )
    tied = getattr(base.model.config, "tie_word_embeddings", False)
    if tied and any(".lm_head." in key or ".embed_out." in key for key in state):
        notes.append(
            "It adapts the output layer, which shares its weights with the embeddings: merging would change the "
            "embeddings too. Keep the adapter apart."
        )
    return notes
