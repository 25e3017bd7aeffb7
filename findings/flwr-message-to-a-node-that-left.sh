#!/usr/bin/env bash
# flwr 1.41.0, on a SuperLink: a message to a SuperNode that has left (stopped in the ordinary way between the look at
# `get_node_ids` and the push) has the empty text as its id. `push_messages` promises None and a warning; its check for None never
# holds, as ids come as text. All such messages share the one id, so `send_and_receive`, on which the stock strategies
# stand, returns with one error for all of them: three messages, two of them to nodes that left, give two replies.
#
# Seen: ids of 0, 0 and 64 characters; replies: 1 ok, 1 error; warned: no
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; sleep 2; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flwr==1.41.0
export PATH="$folder/venv/bin:$PATH" FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
read -r port p0 p1 p2 < <(python3 -c "
import socket
made = [socket.create_server(('127.0.0.1', 0)) for _ in range(4)]
print(*(each.getsockname()[1] for each in made))")
mkdir -p "$folder/home" "$folder/app/fleet"
printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$port" \
  > "$folder/home/config.toml"
cat > "$folder/app/pyproject.toml" <<'TOML'
[project]
name = "fleet"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "fleet.apps:server"
clientapp = "fleet.apps:client"

[tool.flwr.app.config]
first = 0
second = 0
TOML
touch "$folder/app/fleet/__init__.py"
cat > "$folder/app/fleet/apps.py" <<'PY'
import os
import signal
import time

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query("hello")
def hello(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    while len(there := list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    for name in ("first", "second"):
        os.kill(int(context.run_config[name]), signal.SIGTERM)  # as Ctrl-C does
    while len(list(grid.get_node_ids())) > 1:
        time.sleep(0.2)
    ids = grid.push_messages([Message(RecordDict(), node, "query.hello") for node in there])
    print("FOUND ids", *sorted(-1 if name is None else len(name) for name in ids), flush=True)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query.hello") for node in there], timeout=30)
    failed = [reply.has_error() for reply in replies]
    print("FOUND replies", failed.count(False), "ok", failed.count(True), "error", flush=True)
PY
cd "$folder"
flower-superlink --insecure --host 127.0.0.1 --port "$port" --disable-runtime-dependency-installation > link.log 2>&1 &
for _ in $(seq 60); do grep -q "Uvicorn running" link.log && break; sleep 1; done
nodes=()
for own in "$p0" "$p1" "$p2"; do
  flower-supernode --insecure --superlink "127.0.0.1:$port" --port "$own" > "node-$own.log" 2>&1 &
  nodes+=($!)
done
timeout 120 flwr run app here --stream --run-config "first=${nodes[1]} second=${nodes[2]}" > run.log 2>&1 || true
ids=$(sed -n 's/^FOUND ids //p' run.log) replies=$(sed -n 's/^FOUND replies //p' run.log)
warned=$(grep -q "could be pushed" run.log && echo yes || echo no)
echo "ids of $ids characters; replies: $replies; warned: $warned"
[ "$ids" = "0 0 64" ] && [ "$replies" = "1 ok 1 error" ] && [ "$warned" = no ] \
  || { tail -20 run.log; echo "this has changed"; exit 1; }
