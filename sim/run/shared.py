"""What belongs to no device and is kept with the run, of one seed: the adapters of the arm `shared`, and what the
strategy has devices share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from untether.sim.core.durable import written
from untether.sim.core.errors import ResumableStop
from untether.sim.experiment.arms import FEDERATED
from untether.sim.run.directory import RunDirectory


class SharedAdapters:
    """Arrays named `task/PEFT's key`, in `adapters/seed-S/shared.safetensors`."""

    def __init__(self, run: RunDirectory, seed: int):
        self.path = run.path / "adapters" / f"seed-{seed}" / "shared.safetensors"

    @property
    def there(self) -> bool:
        """Whether they have been trained, and can be read."""
        return bool(self.arrays())

    def write(self, arrays: Mapping[str, np.ndarray], left_out: Mapping[str, int]) -> None:
        """Keeps the adapters, and how many items of other users were left out of their training, by reason."""
        whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        with written(self.path, SafetensorError) as temporary:
            save_file(whole, temporary, metadata={"left_out": json.dumps(dict(left_out)), "sum": _sum(whole)})

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the adapters; none before they were trained, or where the file is damaged: they are trained anew."""
        try:
            return _read(self.path)[0]
        except _DAMAGES:
            return {}

    def left_out(self) -> dict[str, int]:
        """Returns how many items were left out, as given to `write`."""
        try:
            return json.loads(_read(self.path)[1].get("left_out", "{}"))
        except _DAMAGES:
            return {}


_DAMAGES = (OSError, RuntimeError, SafetensorError, TypeError, KeyError, ValueError)
"""What the reader of a damaged or missing file raises."""


def _sum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file's arrays and what stands beside them. Raises one of `_DAMAGES`, also where they are not those written."""
    with safe_open(path, framework="numpy") as file:
        found, said = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    if said.get("sum", _sum(found)) != _sum(found):
        raise ValueError("its arrays are not those that were written")
    return found, said


class SharedPart:
    """What a strategy shares after each committed round: arrays, in `adapters/seed-S/federated/round-R.safetensors`.

    `arrays` are those of the last committed round, or what `begin` was given; None before that. `whole`: how many
    weights one adapter has by side, A and B.

    Raises:
        ResumableStop: A commit names a file that is gone or damaged.
    """

    def __init__(self, run: RunDirectory, seed: int, round: int):
        self.run, self.seed = run, seed
        self._fresh = True
        self.arrays: dict[str, np.ndarray] | None = None
        self.whole: dict[str, int] = {}
        commit = run.committed(seed, round) if round >= 0 else None
        if commit is not None and (name := commit["facts"].get("shared_part")):
            path = run.path / name
            try:
                self.arrays, said = _read(path)
                self.whole = json.loads(said["whole"])
                self._fresh = False
            except _DAMAGES as error:
                raise ResumableStop(
                    f"{path}: what devices share after round {round} of seed {seed} cannot be read ({error}). Put the "
                    "file back, or start the run anew in another directory"
                ) from error

    def begin(self, arrays: Mapping[str, np.ndarray], whole: Mapping[str, int]) -> None:
        """Sets what is shared before the first training."""
        self.arrays, self.whole = dict(arrays), dict(whole)

    def sent(self) -> dict[str, np.ndarray]:
        """Returns what devices get: all but the server's own state of the strategy."""
        return {name: array for name, array in (self.arrays or {}).items() if "/server/" not in name}

    def travels(self, sides: str) -> tuple[float, float]:
        """Returns the uploads and downloads of a device, in adapters.

        It uploads the `sides` of one and downloads everything that is sent; nothing before the first round, since each
        device can draw that from the seed.
        """
        one = sum(self.whole.values())
        down = 0 if self._fresh else sum(array.size for array in self.sent().values())
        return (sum(self.whole[side] for side in sides) / one, down / one) if one else (0.0, 0.0)

    def write(self, round: int) -> dict[str, str]:
        """Keeps what is shared after a round. Returns what its commit says of it; nothing where nothing is shared."""
        if self.arrays is None:
            return {}
        self._fresh, path = False, self._path(round)
        whole = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        with written(path, SafetensorError) as temporary:
            save_file(whole, temporary, metadata={"whole": json.dumps(self.whole), "sum": _sum(whole)})
        return {"shared_part": str(path.relative_to(self.run.path))}

    def prune(self, round: int) -> None:
        """Deletes what was shared before `round`, which is committed."""
        for path in self._path(round).parent.glob("round-*.safetensors"):
            if path != self._path(round):
                path.unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self.run.path / "adapters" / f"seed-{self.seed}" / FEDERATED / f"round-{round}.safetensors"
