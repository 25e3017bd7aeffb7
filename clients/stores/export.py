"""`untether export`: one device's private adapter as a PEFT folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from untether.clients.base_model import resolve
from untether.clients.engine.adapters import AdapterStack, save_peft
from untether.clients.engine.base import FrozenBase
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
    return out
