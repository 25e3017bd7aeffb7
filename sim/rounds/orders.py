"""What the round loop tells the hosts: small values, and tables by column whose rows each belong to a device.

Flower's messages carry flat lists, so a table `lost` with columns `device` and `request` travels as `lost.device` and
`lost.request`. Whoever passes an order on, to a host or to a worker, cuts its tables to the devices concerned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any


def columns(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """A table of an order; `header` names its columns, `device` among them."""
    found = list(zip(*rows, strict=True)) or [()] * len(header)
    return {f"{name}.{column}": list(values) for column, values in zip(header, found, strict=True)}


def rows(order: Mapping[str, Any], name: str, *header: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table of an order, as tuples of the columns named. No rows where the order has no such table."""
    return zip(*(order.get(f"{name}.{column}", ()) for column in header), strict=True)


def cut(order: Mapping[str, Any], devices: Collection[int]) -> dict[str, Any]:
    """The order with its tables cut to the rows of `devices`; everything else as it is."""
    mine = set(devices)
    kept = {
        key.removesuffix(".device"): [place for place, device in enumerate(order[key]) if device in mine]
        for key in order if key.endswith(".device")
    }  # fmt: skip
    return {
        key: [value[place] for place in kept[key.partition(".")[0]]] if key.partition(".")[0] in kept else value
        for key, value in order.items()
    }
