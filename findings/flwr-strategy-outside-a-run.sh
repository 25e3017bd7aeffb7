#!/usr/bin/env bash
# flwr 1.41.0: a strategy of flwr.serverapp.strategy cannot be called outside of a run, not even to aggregate arrays.
#
# Strategies take and give `Message` objects, and making one asks `TaskIdentity` for the ids of the current run, which
# only Flower's own processes set. So a unit test of a strategy, or a program that wants FedAdam's arithmetic alone, ends
# in `RuntimeError: TaskIdentity.run_id is not set.`, for a new message and, since a reply needs the message that it
# answers, for a reply as well. Records (ArrayRecord, MetricRecord, RecordDict) can be made anywhere.
#
# Seen: RuntimeError from Message(...) and from FedAvg().configure_train(...). With the three ids set by hand, the mean
# of 1 (3 examples) and 5 (1 example) comes out as 2.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet flwr==1.41.0 numpy
cd "$here"
"$here/venv/bin/python" - <<'PY'
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity


class Nodes:
    def get_node_ids(self):
        return [1, 2]


def ask():
    arrays = ArrayRecord({"w": Array(np.zeros(1))})
    return list(FedAvg().configure_train(1, arrays, ConfigRecord(), Nodes()))


for attempt in (lambda: Message(RecordDict(), dst_node_id=1, message_type="train"), ask):
    try:
        attempt()
    except RuntimeError as error:
        assert "TaskIdentity.run_id is not set" in str(error), error
        print("RuntimeError:", error)
    else:
        raise SystemExit("changed: a message can be made outside of a run")

TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0
asked = {message.metadata.dst_node_id: message for message in ask()}
replies = [
    Message(
        RecordDict({
            "arrays": ArrayRecord({"w": Array(np.array([value]))}), "metrics": MetricRecord({"num-examples": examples}),
        }),
        reply_to=asked[node],
    )
    for node, value, examples in ((1, 1.0, 3), (2, 5.0, 1))
]
arrays, _ = FedAvg().aggregate_train(1, replies)
assert arrays["w"].numpy().tolist() == [2.0]
print("with ids set by hand: mean", arrays["w"].numpy().tolist())
PY
