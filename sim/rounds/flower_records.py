"""Orders and replies as Flower's records, and back."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from untether.sim.rounds.messages import ORDERS, Order, Reply

_JSON = ("parts", "models", "failures", "facts")


def to_records(message: Order | Reply) -> RecordDict:
    """Values and rows, by column, in a ConfigRecord; arrays in an ArrayRecord; a reply's counts in a MetricRecord."""
    found = {}
    if isinstance(message, Order):
        found["order"] = ConfigRecord(order_columns(message))
    else:
        said = {name: json.dumps(getattr(message, name)) for name in _JSON}
        found["reply"] = ConfigRecord({**said, "events": _packed(message.events)})
        found["tables"] = ConfigRecord({name: _packed(rows) for name, rows in message.tables.items()})
        found["lost"] = ConfigRecord({str(device): outcome for device, outcome in message.lost.items()})
        found["devices"] = ConfigRecord({name: list(values) for name, values in message.columns.items() if values})
        found["totals"] = MetricRecord(message.counts())
    if arrays := getattr(message, "arrays", None):
        found["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict(found)


def order_from(content: RecordDict) -> Order:
    """Returns the order that `to_records` was given."""
    return order_of_columns(content["order"], _arrays(content))


def reply_from(content: RecordDict) -> Reply:
    """Returns the reply that `to_records` was given."""
    said = content["reply"]
    columns = {name: list(values) for name, values in content["devices"].items()}
    parsed = {name: json.loads(str(said[name])) for name in _JSON}
    tables = {name: _unpacked(rows) for name, rows in content["tables"].items()}
    lost = {int(device): str(outcome) for device, outcome in content["lost"].items()}
    return Reply(
        columns, _unpacked(said["events"]), arrays=_arrays(content), tables=tables, lost=lost, **parsed
    )  # fmt: skip


def order_columns(order: Order) -> dict[str, Any]:
    """Returns an order but for its arrays, flat: rows `lost` of (device, request) as `lost.device` and `lost.request`.
    """
    flat: dict[str, Any] = {"work": order.work}
    for field in dataclasses.fields(order):
        value = getattr(order, field.name)
        if kind := field.metadata.get("rows"):
            for place, column in enumerate(kind._fields):
                flat[f"{field.name}.{column}"] = [row[place] for row in value]
        elif field.name != "arrays":
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def order_of_columns(flat: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> Order:
    """Returns the order of which `order_columns` made these columns."""
    kind, given = ORDERS[str(flat["work"])], {}
    for field in dataclasses.fields(kind):
        if rows := field.metadata.get("rows"):
            columns = (flat[f"{field.name}.{column}"] for column in rows._fields)
            given[field.name] = tuple(rows(*row) for row in zip(*columns, strict=True))
        elif field.name == "arrays":
            given["arrays"] = arrays or {}
        else:
            value = flat[field.name]
            given[field.name] = tuple(value) if isinstance(value, list | tuple) else value
    return kind(**given)


def _arrays(content: RecordDict) -> dict[str, Any]:
    return {name: array.numpy() for name, array in content["arrays"].items()} if "arrays" in content else {}


def _packed(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as an Arrow stream: columns with their types, and nulls."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _unpacked(packed: Any) -> list[dict[str, Any]]:
    with pa.ipc.open_stream(bytes(packed)) as reader:
        return reader.read_all().to_pylist()
