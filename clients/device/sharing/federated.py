"""Joint training on the device, by a strategy's rules: each device's part, the sums of a shard, and the adapter that
answers.

The strategy decides what is trained, uploaded and kept (`strategies.shared_lora`). A reply holds only terms of sums;
what a device keeps goes to the devices' store.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from untether.clients.device.answering import LiveAdapter, Owner
from untether.clients.device.arms import TrainingData, training_pairs
from untether.clients.device.device import Device
from untether.clients.device.scoring import train_event_rows, training_rows
from untether.clients.device.worker import Inputs, Outcome, Worker
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.encoding import encode_answer, encode_prompt
from untether.clients.engine.jobs import tokens_a_step
from untether.clients.engine.training import Example, Trainable, TrainJob
from untether.clients.stores.adapter_cache import train_once
from untether.clients.stores.adapter_store import AdapterArrays, adapter_version, as_arrays, as_tensors
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec, TrainSettings
from untether.sim.core.seeding import derive
from untether.sim.experiment import Experiment
from untether.sim.experiment.arms import FEDERATED
from untether.sim.population.order import latest_s
from untether.sim.population.others import open_items
from untether.sim.rounds.messages import Begin, Learn, Reply, Update, Version, joined
from untether.sim.rounds.sharing import group_of, private_name, rank_of
from untether.sim.time.timeline_state import REAL
from untether.strategies.factors import Factors, beside, cut, factors_of, scaled, state_of
from untether.strategies.factors import rank_of as rank_in
from untether.strategies.fleet import open_strategy
from untether.strategies.shared_lora import Block, SharedLora, Site, compacted, in_group, total

PREFIX = FEDERATED
"""Of what the strategy shares, among the arrays of a learn order."""


def begin(worker: Worker, order: Begin, inputs: Inputs) -> Outcome:
    """Returns the initial shared part, by group, and the number of an adapter's weights, by side."""
    strategy = _strategy(worker.experiment)
    init = _initial(worker, derive(order.seed, FEDERATED, "adapter"))
    arrays = {f"{group}/{name}": array for group in order.groups for name, array in strategy.begin(init).items()}
    rank = worker.experiment.for_arm(FEDERATED)[0].rank
    whole = {"A": sum(rank * A.shape[1] for A, _ in init.values()), "B": sum(rank * len(B) for _, B in init.values())}
    return Outcome(Reply(facts={"whole": whole}, arrays=arrays))


@dataclass(frozen=True, slots=True)
class _Part:
    """A device's part in a round."""

    device: Device
    group: str
    site: Site
    blocks: list[Block]


def update(worker: Worker, order: Update, inputs: Inputs) -> Outcome:
    """Trains each device's part on its real items, without those that hold a scored text."""
    experiment, strategy = worker.experiment, _strategy(worker.experiment)
    _, training = experiment.for_arm(FEDERATED)
    left_out: Counter[str] = Counter()
    parts: dict[Version, _Part] = {}
    jobs = []
    for device, site, group, pairs in _sites(worker, order, inputs, left_out):
        if not pairs:
            continue
        blocks = strategy.local(in_group(order.arrays, group), site)
        version = Version(device.index, FEDERATED, order.round, REAL, 0.0, "")
        parts[version] = _Part(device, group, site, blocks)
        moves = [(block.A, block.B) for block in blocks for _ in range(rank_in(block.factors))]
        tokenizer = worker.base.tokenizer
        jobs.append(TrainJob(
            key=version,
            examples=[Example(encode_prompt(tokenizer, p), encode_answer(tokenizer, a)) for p, a in pairs],
            settings=TrainSettings.of(training),
            spec=_spec(experiment, len(moves)),
            seed=derive(order.seed, device.device_id, order.round, FEDERATED, "train"),
            state=as_tensors(state_of(total(blocks))),
            trainable=Trainable(tuple(A for A, _ in moves), tuple(B for _, B in moves)),
            proximal_mu=strategy.mu,
        ))  # fmt: skip
    engine, each = experiment.engine, tokens_a_step(jobs)
    results = train_once(
        worker.base, jobs, engine.cache, memory_bytes=int(engine.memory_gib * 2**30) or None,
        max_cohort=engine.cohort or None,
        progress=lambda done, total: worker.progress(
            len(order.devices) * done / max(1, total), tokens=each * done, tokens_due=each * total
        ),
    )  # fmt: skip
    sums, kept = Reply(), defaultdict(dict)
    for version, result in results.items():
        if result.outcome != "ok":
            continue
        part = parts[version]
        trained = _split(part.blocks, factors_of(as_arrays(result.state)))
        shared = in_group(order.arrays, part.group)
        up = strategy.upload(shared, trained, part.site)
        sums = joined([sums, Reply(arrays={f"{part.group}/{name}": array for name, array in up.items()})])
        if stays := strategy.keep(shared, trained, part.site):
            kept[private_name(part.site.rank)][part.device.device_id] = stays
    outcomes = {version.device: result.outcome for version, result in results.items()}
    columns = {
        "device": list(order.devices), "outcome": [outcomes.get(device, "no_data") for device in order.devices],
    }  # fmt: skip
    reply = Reply(
        columns, train_event_rows(order, results), arrays=compacted(sums.arrays),
        facts={"federated_left_out": dict(left_out)},
    )  # fmt: skip
    return Outcome(reply, {"training": training_rows(results)}, kept)


def federated_adapters(
    worker: Worker, order: Learn, shared: Mapping[Device, Factors]
) -> dict[Owner, list[LiveAdapter]]:
    """Returns the adapter that each device answers with, by (device, FEDERATED): the shared part and what it kept."""
    return {
        (device.index, FEDERATED): [
            LiveAdapter(
                _spec(worker.experiment, rank_in(factors)), as_tensors(state := state_of(factors)),
                adapter_version(state), until_s=latest_s(device.real_items(worker.experiment, order.round)),
            )
        ]
        for device, factors in shared.items()
    }  # fmt: skip


def worn(
    worker: Worker, order: Learn, devices: Sequence[Device], inputs: Inputs
) -> dict[Device, Factors]:
    """Returns each device's adapter from the shared part; none where it is the base model alone."""
    shared = in_group(order.arrays, PREFIX)
    strategy, found = _strategy(worker.experiment), {}
    init = _initial(worker, derive(order.seed, FEDERATED, "adapter"))
    for device in devices:
        site, group = _site(worker, order, device, inputs, init, 0)
        if factors := strategy.worn(in_group(shared, group), site):
            found[device] = factors
    return found


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where an adapter's training begins, and what of it is trained (None: all)."""

    spec: LoraSpec
    state: AdapterArrays
    trainable: Trainable | None = None


def beginning(
    worker: Worker, arm: str, factors: Factors, init_seed: int, before: AdapterArrays | None = None
) -> Beginning:
    """Returns an arm's adapter that begins as what is shared (`training.start` is `shared`), or on top of it
    (`on_shared`): then the shared ranks come first and stay, and its own are new, or those of `before`.

    Raises:
        UserError: It begins as what is shared, and has another rank.
    """
    lora, training = worker.experiment.for_arm(arm)
    spec = LoraSpec.of(lora)
    below = scaled(factors, _spec(worker.experiment, 1).scaling / spec.scaling)
    if training.start != "on_shared":
        if rank_in(below) != spec.rank:
            raise UserError(
                f'training.start = "shared" of {arm}: what is shared has rank {rank_in(below)} and lora.rank is '
                f'{spec.rank}. Give them one rank, or set training.start = "on_shared"'
            )
        return Beginning(spec, state_of(below))
    stack = AdapterStack.create(worker.base, [spec], [init_seed])
    own = factors_of(before if before is not None else as_arrays(stack.state(0)))
    own = {target: (A[-spec.rank :], B[:, -spec.rank :]) for target, (A, B) in own.items()}
    moves = (False,) * rank_in(below) + (True,) * spec.rank
    return Beginning(spec.at_rank(len(moves)), state_of(beside([below, own])), Trainable(moves, moves))


def _sites(
    worker: Worker, order: Update, inputs: Inputs, left_out: Counter[str]
) -> Iterator[tuple[Device, Site, str, list[tuple[str, str]]]]:
    """Every device of the order, with what it trains on."""
    devices, experiment = worker.devices(order), worker.experiment
    items = {device: device.real_items(experiment, order.round) for device in devices}
    allowed, excluded = open_items(worker.population(order.seed), [item for own in items.values() for item in own])
    left_out.update(excluded)
    init = _initial(worker, derive(order.seed, FEDERATED, "adapter"))
    for device in devices:
        data = TrainingData(tuple(item for item in items[device] if item in allowed))
        pairs = training_pairs(FEDERATED, data, order.seed, device.device_id, order.round)
        site, group = _site(worker, order, device, inputs, init, len(pairs))
        yield device, site, group, pairs


def _site(
    worker: Worker, order: Update | Learn, device: Device, inputs: Inputs, init: Factors, examples: int
) -> tuple[Site, str]:
    """A device as the strategy sees it, and its group."""
    experiment = worker.experiment
    rank = rank_of(experiment, order.seed, device.device_id)
    own = derive(order.seed, device.device_id, order.round, FEDERATED, "adapter")
    site = Site(
        device.index, order.round, rank, examples, cut(init, rank),
        lambda: cut(_initial(worker, own), rank), inputs.private.get(device.index, {}),
    )  # fmt: skip
    return site, group_of(experiment, device.user.tasks)


def _strategy(experiment: Experiment) -> SharedLora:
    """The strategy; the experiment's own check has seen to it that it shares."""
    return open_strategy(experiment)  # type: ignore[return-value]


def _initial(worker: Worker, seed: int) -> Factors:
    """A fresh adapter of the largest rank: a smaller one is the beginning of it."""
    spec = _spec(worker.experiment, max(worker.experiment.ranks))
    return factors_of(as_arrays(AdapterStack.create(worker.base, [spec], [seed]).state(0)))


def _spec(experiment: Experiment, rank: int) -> LoraSpec:
    """An adapter of several blocks: of so many ranks, at the scaling that all devices have."""
    return LoraSpec.of(experiment.for_arm(FEDERATED)[0]).at_rank(rank)


def _split(blocks: Sequence[Block], factors: Factors) -> dict[str, Factors]:
    """What was trained, block by block; what was frozen is left out."""
    found, at = {}, 0
    for block in blocks:
        rank = rank_in(block.factors)
        if block.A or block.B:
            found[block.name] = {t: (A[at : at + rank], B[:, at : at + rank]) for t, (A, B) in factors.items()}
        at += rank
    return found
