"""Many LoRA adapters stacked on one frozen base, with their states under PEFT's keys.

All weights of adapter k lie in row k of one matrix `flat` [adapters, size], layer after layer, A as [rank, in] and B
transposed as [rank, out], ranks zero-padded to the largest. So clipping and the optimizer work on rows, and a batch
gathers the adapters that it uses with one copy. Layers that the base runs as one product (q, k, v; gate, up) have their
As side by side. Zero padding stays zero: its gradients are zero by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from untether.clients.engine.base import FrozenBase
from untether.clients.engine.door.peft_format import attention_hint, load_peft, save_peft, target_names
from untether.clients.engine.door.trial import try_adapted
from untether.clients.engine.jobs import Trainable
from untether.clients.engine.lora_layers import Fusion, LinearPart, Piece, Route, weight_of
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Target:
    """One adapted layer: where its A [rank, in] and its B transposed [rank, out] begin in a row of the flat matrix."""

    name: str
    inputs: int
    outputs: int
    at_A: int
    at_B: int


class Layout:
    """Where each target's weights lie in a flat row.

    Args:
        shapes: (name, in, out) of every target in the model's order.
        rank: The largest rank.
        fusions: Names of layers that the base runs together; their As lie side by side.
    """

    def __init__(self, shapes: Sequence[tuple[str, int, int]], rank: int, fusions: Sequence[Fusion] = ()):
        self.rank = rank
        self.targets: dict[str, Target] = {}
        self.fused: dict[Fusion, list[tuple[str, int]]] = {}
        by_name = {name: (inputs, outputs) for name, inputs, outputs in shapes}
        offset = 0
        for names in [*fusions, *((name,) for name, _, _ in shapes)]:
            own = [(name, member) for member, name in enumerate(names) if name in by_name and name not in self.targets]
            if len(names) > 1 and own:
                self.fused[names] = own
            at_B = offset + sum(rank * by_name[name][0] for name, _ in own)
            for name, _ in own:
                inputs, outputs = by_name[name]
                self.targets[name] = Target(name, inputs, outputs, offset, at_B)
                offset += rank * inputs
                at_B += rank * outputs
            offset = at_B if own else offset
        self.size = offset
        parts = [(t.at_A, t.inputs, t.name, 0) for t in self.targets.values()]
        parts += [(t.at_B, t.outputs, t.name, 1) for t in self.targets.values()]
        self._in_order = [(name, side, width) for _, width, name, side in sorted(parts)]
        self._widths = [rank * width for _, _, width in self._in_order]

    def of_row(self, row: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the views A [rank, in] and B [rank, out] of every target of one adapter's row [size], cut at once."""
        views: dict[str, list[Tensor]] = {name: [row, row] for name in self.targets}
        for (name, side, width), part in zip(self._in_order, row.split(self._widths), strict=True):
            views[name][side] = part.view(self.rank, width)
        return {name: (A, B) for name, (A, B) in views.items()}

    def A(self, flat: Tensor, name: str) -> Tensor:
        """Returns the view [adapters, rank, in] of a target's A."""
        target = self.targets[name]
        return flat[:, target.at_A : target.at_A + self.rank * target.inputs].unflatten(1, (self.rank, target.inputs))

    def B(self, flat: Tensor, name: str) -> Tensor:
        """Returns the view [adapters, rank, out] of a target's B, transposed."""
        target = self.targets[name]
        return flat[:, target.at_B : target.at_B + self.rank * target.outputs].unflatten(1, (self.rank, target.outputs))

    def parts(self, flat: Tensor, grad: Tensor | None, fused: bool) -> dict[str | Fusion, LinearPart]:
        """Returns the parts of a route: each target under its name and, if `fused`, each fusion under its names."""
        parts: dict[str | Fusion, LinearPart] = {name: self._part(flat, grad, [(name, 0)]) for name in self.targets}
        if fused:
            parts |= {names: self._part(flat, grad, members) for names, members in self.fused.items()}
        return parts

    def _part(self, flat: Tensor, grad: Tensor | None, members: list[tuple[str, int]]) -> LinearPart:
        first = self.targets[members[0][0]]
        rows = len(members) * self.rank
        span = slice(first.at_A, first.at_A + rows * first.inputs)
        pieces = []
        for index, (name, member) in enumerate(members):
            grad_B = None if grad is None else self.B(grad, name)
            pieces.append(Piece(self.B(flat, name), grad_B, index * self.rank, (index + 1) * self.rank, member))
        A = flat[:, span].unflatten(1, (rows, first.inputs))
        grad_A = None if grad is None else grad[:, span].unflatten(1, (rows, first.inputs))
        return LinearPart(tuple(name for name, _ in members), A, grad_A, pieces)


class AdapterStack:
    """K adapters on a base. `flat` [adapters, size] holds every weight; float32, or float64 on a float64 base."""

    def __init__(self, base: FrozenBase, specs: Sequence[LoraSpec]):
        self.base, self.specs = base, list(specs)
        self.targets_of = [target_names(base, spec) for spec in self.specs]
        wanted = set().union(*self.targets_of)
        shapes = [
            (name, weight_of(module).shape[1], weight_of(module).shape[0])
            for name, module in base.routing.names.items()
            if name in wanted
        ]
        self.layout = Layout(shapes, max(spec.rank for spec in self.specs), base.routing.fusions)
        self.dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self.flat = torch.zeros(len(self.specs), self.layout.size, dtype=self.dtype, device=base.device)
        self._set_scale()
        for spec in self.specs:
            if base.lean is None and spec.target_modules not in base.tried:
                _try_adapters(base, spec.target_modules)

    @classmethod
    def create(cls, base: FrozenBase, specs: Sequence[LoraSpec], seeds: Sequence[int]) -> AdapterStack:
        """Returns fresh adapters, one a seed, initialised as in PEFT (A kaiming uniform, a = sqrt 5; B zero)."""
        stack = cls(base, specs)
        for k, (_, seed) in enumerate(zip(specs, seeds, strict=True)):
            stack.reset(k, seed)
        return stack

    @classmethod
    def of_states(
        cls, base: FrozenBase, specs: Sequence[LoraSpec], states: Sequence[dict[str, Tensor]]
    ) -> AdapterStack:
        """Returns a stack of adapters from their states under PEFT's keys."""
        stack = cls(base, specs)
        for k, (_, state) in enumerate(zip(specs, states, strict=True)):
            stack.load(k, state)
        return stack

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def bytes_per_adapter(self) -> int:
        """Bytes an adapter takes while it trains: weights, gradient and Adam's two moments."""
        return 4 * self.layout.size * self.flat.element_size()

    def assign(self, k: int, spec: LoraSpec, seed: int, state: dict[str, Tensor] | None = None) -> None:
        """Puts another adapter into slot k: from a PEFT state if given, else freshly initialised."""
        self.specs[k], self.targets_of[k] = spec, target_names(self.base, spec)
        self._set_scale()
        if state is None:
            self.reset(k, seed)
        else:
            self.load(k, state)

    def reset(self, k: int, seed: int) -> None:
        """Initialises adapter k anew from its seed."""
        rank, names = self.specs[k].rank, self.targets_of[k]
        draw = torch.Generator().manual_seed(seed % (1 << 63))
        widths = [rank * self.layout.targets[name].inputs for name in names]
        values = torch.empty(sum(widths), dtype=torch.float32).uniform_(-1, 1, generator=draw).to(self.dtype)
        row = self._empty_row()
        views, parts = self.layout.of_row(row), values.split(widths)
        own = [part.view(rank, -1) / math.sqrt(part.numel() // rank) for part in parts]
        torch._foreach_copy_([views[name][0][:rank] for name in names], own)
        self.flat[k] = row

    def moving(self, k: int, trainable: Trainable) -> Tensor:
        """Returns which of adapter k's weights are trainable, [size], bool."""
        row, rank = torch.zeros(self.layout.size, dtype=torch.bool), self.specs[k].rank
        if len(trainable.A) != rank or len(trainable.B) != rank:
            raise ValueError(f"an adapter of rank {rank} needs {rank} values of trainable A and B")
        A, B = (torch.tensor(side)[:, None] for side in (trainable.A, trainable.B))
        views = self.layout.of_row(row)
        for name in self.targets_of[k]:
            views[name][0][:rank] = A
            views[name][1][:rank] = B
        return row.to(self.flat.device)

    def state(self, k: int) -> dict[str, Tensor]:
        """Returns adapter k under PEFT's keys: lora_A.weight [rank, in] and lora_B.weight [out, rank], on the CPU."""
        views, rank = self.layout.of_row(self.flat[k].detach().cpu()), self.specs[k].rank
        state = {}
        for name in self.targets_of[k]:
            A, B = views[name]
            state[f"{_PREFIX}{name}.lora_A.weight"] = A[:rank].clone()
            state[f"{_PREFIX}{name}.lora_B.weight"] = B[:rank].t().clone(memory_format=torch.contiguous_format)
        return state

    def load(self, k: int, state: dict[str, Tensor]) -> None:
        """Sets adapter k from PEFT's keys.

        Raises:
            UserError: Keys or shapes are not this adapter's.
        """
        rank = self.specs[k].rank
        expected = {f"{_PREFIX}{name}.lora_{side}.weight" for name in self.targets_of[k] for side in "AB"}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)[0]
            raise UserError(
                f"adapter state {'lacks' if odd in expected else 'has the unexpected'} key {odd!r}; its target modules "
                f"must be {self.specs[k].target_modules!r} on this base"
            )
        row = self._empty_row()
        views, places, values = self.layout.of_row(row), list[Tensor](), list[Tensor]()
        for name in self.targets_of[k]:
            A, B = state[f"{_PREFIX}{name}.lora_A.weight"], state[f"{_PREFIX}{name}.lora_B.weight"]
            target = self.layout.targets[name]
            if A.shape != (rank, target.inputs) or B.shape != (target.outputs, rank):
                raise UserError(
                    f"adapter state {name!r}: A {tuple(A.shape)} and B {tuple(B.shape)} where rank {rank} needs "
                    f"{(rank, target.inputs)} and {(target.outputs, rank)}; give the rank the adapter was made with"
                )
            places += [view[:rank] for view in views[name]]
            values += [A, B.t()]
        torch._foreach_copy_(places, values)
        self.flat[k] = row

    def _empty_row(self) -> Tensor:
        """An adapter's row, to be filled on the CPU: a GPU takes a whole row as fast as one of its parts."""
        return torch.zeros(self.layout.size, dtype=self.dtype)

    def save_peft(self, k: int, folder: str | Path) -> None:
        """Writes adapter k as a PEFT folder that `PeftModel.from_pretrained` loads."""
        save_peft(folder, self.specs[k], self.state(k), self.base)

    def load_peft(self, k: int, folder: str | Path) -> None:
        """Sets adapter k, weights and shape, from a PEFT folder."""
        spec, state = load_peft(folder)
        if spec.rank > self.layout.rank or not set(target_names(self.base, spec)) <= set(self.layout.targets):
            raise UserError(f"{folder}: rank {spec.rank} or its target modules do not fit into this stack")
        self.assign(k, spec, 0, state)

    def route(
        self, slots: Sequence[int], counts: Sequence[int], rows: int, flat: Tensor | None = None,
        grad: Tensor | None = None, dropout=None,
    ) -> Route:  # fmt: skip
        """Returns the route of a batch of `rows` rows.

        Args:
            slots: The adapters that the batch uses, by place in the stack.
            counts: counts[i] rows use slots[i], in order; the rest use the bare base.
            rows: Number of rows.
            flat: [slots, size] The slots' weights, where they are gathered already (training).
            grad: [slots, size] Where their gradients go (training).
            dropout: (layer name, route, input) -> mask like the input.
        """
        index = torch.tensor(list(slots), dtype=torch.long, device=self.flat.device)
        if flat is None:
            whole = list(slots) == list(range(len(self)))
            flat = self.flat if whole else self.flat[index]
        parts = self.layout.parts(flat, grad, fused=dropout is None)
        return Route(counts, rows, parts, self._scale[index].view(-1, 1, 1), dropout)

    @contextmanager
    def active(self, route: Route) -> Iterator[None]:
        """Makes the base's layers follow a route while the context is open."""
        before, self.base.routing.route = self.base.routing.route, route
        try:
            yield
        finally:
            self.base.routing.route = before

    def _set_scale(self) -> None:
        self._scale = torch.tensor([spec.scaling for spec in self.specs], dtype=self.dtype, device=self.base.device)


def _try_adapters(base: FrozenBase, target_modules: tuple[str, ...] | str) -> None:
    """Raises UserError where rows of a batch with adapters on these layers differ from each row with its own alone."""
    base.tried.add(target_modules)
    specs = [LoraSpec(rank, 2 * rank, target_modules=target_modules) for rank in (1, 2)]
    stack = AdapterStack.create(base, specs, [1, 2])
    draw = torch.Generator().manual_seed(3)
    stack.flat.add_(0.05 * torch.randn(stack.flat.shape, generator=draw).to(stack.flat))
    worn = [
        {
            name: (stack.layout.A(stack.flat, name)[k], stack.layout.B(stack.flat, name)[k].T, spec.scaling)
            for name in stack.targets_of[k]
        }
        for k, spec in enumerate(specs)
    ]
    route, remedy = stack.route([0, 1], [1, 1], 3), attention_hint(base.model)

    def routed(*inputs, **named) -> Tensor:
        with stack.active(route):
            return base.logits_at(*inputs, **named)

    begun = f"target_modules {target_modules!r} cannot be adapted here: "
    try:
        apart = try_adapted(base.model, routed, base.routing.names, worn)
    except NotImplementedError as error:
        base.tried.discard(target_modules)
        raise UserError(f"{begun}{error}{remedy}") from error
    if apart:
        base.tried.discard(target_modules)
        raise UserError(
            f"{begun}with adapters on them, a {type(base.model).__name__} answers otherwise in a batch than alone "
            f"(logits differ by {apart:.2g} standard deviations){remedy}"
        )
