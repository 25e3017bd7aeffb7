"""Private adapters on disk: one safetensors file for each arm and block of devices, tensors stacked over its devices.

`adapters/seed-S/round-R/<arm>/<block>.safetensors` holds every LoRA tensor as [devices, ...]; its metadata names the
devices and what they were trained `on`. A device's adapter is the one of the latest round that trained it. A round may
train it twice, first on its own data and then `on` samples: the second is the round's own, the first is kept under
`<arm>.first`. Files are written whole or not at all; `prune` deletes those that later rounds have superseded, so that a
run of many rounds holds two. `state/adapters` names each file that is there: one that is named and gone is an error,
for a device without an adapter would begin anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from untether.sim.core import strict_json
from untether.sim.core.durable import write_atomically, written
from untether.sim.core.errors import UserError
from untether.sim.rounds.messages import FIRST
from untether.sim.run.whole import REMEDY, damaged

if TYPE_CHECKING:
    from torch import Tensor

AdapterArrays = Mapping[str, np.ndarray]
"""One adapter: PEFT's key -> array. Not tensors: a host, which reads and writes them, does without torch."""


def as_arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns the engine's adapter as arrays in main memory."""
    return {name: tensor.detach().contiguous().cpu().numpy() for name, tensor in state.items()}


def as_tensors(state: AdapterArrays) -> dict[str, Tensor]:
    """Returns an adapter for the engine, as tensors in memory of their own."""
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def adapter_version(state: Mapping[str, Any], digest_size: int = 6) -> str:
    """Returns a fingerprint of an adapter's weights of `digest_size` bytes: equal adapters have equal versions."""
    digest = hashlib.blake2b(digest_size=digest_size)
    for name in sorted(state):
        digest.update(name.encode())
        whole = state[name] if isinstance(state[name], np.ndarray) else as_arrays({name: state[name]})[name]
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


class AdapterStore:
    """The adapters of one seed of a run."""

    def __init__(self, run: str | Path, seed: int):
        self.root = Path(run) / "adapters" / f"seed-{seed}"
        self._named = Path(run) / "state" / "adapters" / f"seed-{seed}"
        self._index: dict[tuple[int, str], dict[str, tuple[Path, int]]] = {}

    def save(self, round: int, block: str, by_arm: Mapping[str, Mapping[str, AdapterArrays]]) -> list[str]:
        """Writes the adapters of a block, by arm and device id. Returns the paths, relative to the store's root."""
        paths = []
        for arm, states in by_arm.items():
            devices = list(states)
            names = list(next(iter(states.values())))
            stacked = {name: np.stack([states[device][name] for device in devices]) for name in names}
            path = self.root / f"round-{round}" / arm / f"{block}.safetensors"
            with written(path, SafetensorError) as temporary:
                sums = [adapter_version(states[device]) for device in devices]
                save_file(stacked, temporary, metadata={"devices": json.dumps(devices), "versions": json.dumps(sums)})
            write_atomically(self._name_of(path), "")
            paths.append(str(path.relative_to(self.root)))
            self._index.pop((round, arm), None)
        return paths

    def load(self, round: int, device: str, arm: str) -> dict[str, np.ndarray] | None:
        """Returns the device's adapter as of `round` (the latest at or before it), or None."""
        for earlier in range(round, -1, -1):
            if (found := self.load_exactly(earlier, device, arm)) is not None:
                return found
        return None

    def load_exactly(self, round: int, device: str, arm: str) -> dict[str, np.ndarray] | None:
        """Returns the adapter that the device trained in this very round, or None."""
        place = self._devices(round, arm).get(device)
        return None if place is None else self._read(*place)

    def devices(self, round: int, arm: str) -> Sequence[str]:
        """Returns the devices that trained this arm in this round."""
        return sorted(self._devices(round, arm))

    def prune(self, round: int) -> int:
        """Deletes files of rounds before `round` whose every device has a later adapter, at or before it.

        Call it once `round` is committed and its adapters are live: nothing older is needed then, nor the first of two
        adapters of one round.

        Returns:
            How many files were deleted.
        """
        older = sorted(number for number in self._rounds() if number < round)
        arms = {path.name for number in older for path in _listed(self.root / f"round-{number}")}
        gone = 0
        for arm in arms:
            later = set(self._devices(round, arm))
            for number in reversed(older):
                folder = self.root / f"round-{number}" / arm
                mine = self._devices(number, arm)
                for path in _listed(folder, "*.safetensors"):
                    if arm.endswith(FIRST) or all(d in later for d, (place, _) in mine.items() if place == path):
                        self._name_of(path).unlink(missing_ok=True)
                        path.unlink(missing_ok=True)
                        gone += 1
                later |= set(mine)
                with contextlib.suppress(OSError):  # not empty, or another worker was first
                    folder.rmdir()
                    folder.parent.rmdir()
        self._index.clear()
        return gone

    @staticmethod
    def _read(path: Path, row: int) -> dict[str, np.ndarray]:
        try:
            with safe_open(path, framework="numpy") as file:
                found = {name: file.get_slice(name)[row] for name in file.keys()}
                sums = strict_json.loads((file.metadata() or {}).get("versions", "null"))
        except (OSError, RuntimeError, SafetensorError, ValueError, IndexError) as error:
            raise damaged(path, error) from error
        if sums is not None and not (isinstance(sums, list) and adapter_version(found) in sums[row : row + 1]):
            raise damaged(path, "an adapter in it is not the one that was written")
        return found

    def _rounds(self) -> list[int]:
        names = [path.name.removeprefix("round-") for path in self.root.glob("round-*")]
        return [int(name) for name in names if name.isdecimal()]

    def _name_of(self, path: Path) -> Path:
        """Where it is written that a file is there, or the files of a folder."""
        return self._named / path.relative_to(self.root)

    def _devices(self, round: int, arm: str) -> dict[str, tuple[Path, int]]:
        if (round, arm) not in self._index:
            found: dict[str, tuple[Path, int]] = {}
            folder = self.root / f"round-{round}" / arm
            for name in _listed(self._name_of(folder)):
                path = folder / name.name
                if not path.exists() and name.exists():  # not just pruned: then its name went first
                    raise UserError(f"{path}: this file of the run is gone. {REMEDY}")
            for path in _listed(folder, "*.safetensors"):
                try:
                    with safe_open(path, framework="numpy") as file:
                        devices = strict_json.loads(file.metadata()["devices"])
                    if not isinstance(devices, list):
                        raise ValueError("it names no devices")
                except (OSError, RuntimeError, SafetensorError, ValueError, TypeError, KeyError) as error:
                    if path.exists():
                        raise damaged(path, error) from error
                    continue  # another worker has just pruned it
                found |= {device: (path, row) for row, device in enumerate(devices)}
            self._index[round, arm] = found
        return self._index[round, arm]


def _listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds, in order; nothing where another worker has just pruned it."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []
