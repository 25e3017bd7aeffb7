"""LoRA adapters as factors, and what aggregation does with them. numpy alone; every sum in float64.

Arrays that travel are named `block/side/target`: side A [rank, in], side B [out, rank]. A strategy's arrays may lie in
several blocks, such as `lora` and `past`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from untether.sim.core.errors import UserError

Arrays = Mapping[str, np.ndarray]
"""What travels or is kept, by name."""

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""(A [rank, in], B [out, rank]) of every target. The adapter adds scaling * B A to the target's weight [out, in]."""

_KEY = ".lora_{}.weight"


def factors_of(state: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the factors of an adapter under PEFT's keys, in float64."""
    targets = [key.removesuffix(_KEY.format("A")) for key in state if key.endswith(_KEY.format("A"))]
    return {
        target: (
            np.asarray(state[target + _KEY.format("A")], np.float64),
            np.asarray(state[target + _KEY.format("B")], np.float64),
        )
        for target in targets
    }


def state_of(factors: Factors) -> dict[str, np.ndarray]:
    """Returns the adapter under PEFT's keys, in float32."""
    state = {}
    for target, (A, B) in factors.items():
        state[target + _KEY.format("A")] = np.ascontiguousarray(A, np.float32)
        state[target + _KEY.format("B")] = np.ascontiguousarray(B, np.float32)
    return state


def named(block: str, factors: Factors, sides: str = "AB") -> dict[str, np.ndarray]:
    """Returns one or both sides of factors as arrays of a block."""
    return {
        f"{block}/{side}/{target}": np.asarray(pair["AB".index(side)], np.float64)
        for target, pair in factors.items() for side in sides
    }  # fmt: skip


def side_of(arrays: Arrays, block: str, side: str) -> dict[str, np.ndarray]:
    """Returns one side of a block, by target."""
    begin = f"{block}/{side}/"
    return {name.removeprefix(begin): array for name, array in arrays.items() if name.startswith(begin)}


def factors_in(arrays: Arrays, block: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns both sides of a block."""
    B = side_of(arrays, block, "B")
    return {target: (A, B[target]) for target, A in side_of(arrays, block, "A").items()}


def rank_of(factors: Factors) -> int:
    """Returns the largest rank among the targets (0 of no target)."""
    return max((len(A) for A, _ in factors.values()), default=0)


def cut(factors: Factors, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the first `rank` ranks."""
    return {target: (A[:rank], B[:, :rank]) for target, (A, B) in factors.items()}


def padded(factors: Factors, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns them with zeros up to `rank`, which change nothing."""
    return {
        target: (
            np.concatenate([A, np.zeros((rank - len(A), A.shape[1]), A.dtype)]),
            np.concatenate([B, np.zeros((len(B), rank - len(A)), B.dtype)], axis=1),
        )
        for target, (A, B) in factors.items()
    }


def scaled(factors: Factors, by: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns them with B times a number."""
    return {target: (A, by * B) for target, (A, B) in factors.items()}


def beside(blocks: Sequence[Factors]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Adapters as one, whose product is the sum of theirs: rank after rank, each padded to one rank for all targets.

    Raises:
        UserError: Their targets or the widths of these differ.
    """
    blocks = [padded(block, rank_of(block)) for block in blocks if block]
    if not blocks:
        return {}
    for other in blocks[1:]:
        check_targets(other, blocks[0])
    return {
        target: (
            np.concatenate([block[target][0] for block in blocks]),
            np.concatenate([block[target][1] for block in blocks], axis=1),
        )
        for target in blocks[0]
    }


def check_targets(given: Factors, wanted: Factors) -> None:
    """Raises UserError unless two adapters are on the same layers, which are as wide."""
    if odd := sorted(set(given) ^ set(wanted)):
        raise UserError(
            f"two adapters do not fit: only one of them has {odd[0]}. Give all devices the same lora.target_modules"
        )
    for target, (A, B) in given.items():
        theirs = wanted[target]
        if A.shape[1] != theirs[0].shape[1] or len(B) != len(theirs[1]):
            raise UserError(
                f"two adapters do not fit: {target} maps {A.shape[1]} to {len(B)} in one and {theirs[0].shape[1]} to "
                f"{len(theirs[1])} in the other. Give all devices the same base model"
            )


def compact(A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product B A, of a rank of at most the smaller width: exact."""
    inputs, outputs = A.shape[1], len(B)
    if len(A) <= min(inputs, outputs):
        return A, B
    product = B @ A
    return (np.eye(inputs), product) if inputs <= outputs else (product, np.eye(outputs))


def best(A: np.ndarray, B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of this rank whose product is nearest to B A, the greatest singular values first, each side
    bearing the square root. Never makes the product itself: QR of both sides, SVD of what is between them. Of the two
    signs that a pair of singular vectors may have, B's largest entry is positive: which one comes out is a matter of
    rounding, and training goes on from it.
    """
    Q_A, R_A = np.linalg.qr(A.T)  # A = R_A^T Q_A^T
    Q_B, R_B = np.linalg.qr(B)
    U, S, V = np.linalg.svd(R_B @ R_A.T)
    root = np.sqrt(S[:rank])
    A, B = root[:, None] * (V[: len(root)] @ Q_A.T), (Q_B @ U[:, : len(root)]) * root
    sign = np.sign(B[np.abs(B).argmax(axis=0), np.arange(len(root))])
    sign[sign == 0] = 1.0
    A, B = A * sign[:, None], B * sign
    missing = rank - len(root)
    return np.pad(A, ((0, missing), (0, 0))), np.pad(B, ((0, 0), (0, missing)))


def products(factors: Factors) -> dict[str, np.ndarray]:
    """Returns B A of every target, [out, in]."""
    return {target: B @ A for target, (A, B) in factors.items()}


def norm(factors: Factors) -> float:
    """Frobenius norm of all products together, without making them: sum of (A A^T) * (B^T B)."""
    return float(np.sqrt(max(0.0, sum(np.sum((A @ A.T) * (B.T @ B)) for A, B in factors.values()))))
