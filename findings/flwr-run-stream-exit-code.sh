#!/usr/bin/env bash
# flwr 1.41.0: `flwr run APP --stream` follows a run to its end and exits with 0 also where the run failed: the ServerApp
# raised, its traceback is in the log, and `flwr list` calls the run `finished:failed`. A script or a CI job that goes by
# the exit code takes every run for a good one; it has to ask `flwr list --format json` for the run's status.
#
# Seen: flwr run --stream: exit code 0, the log has the ServerApp's error; flwr list: finished:failed
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${link:-0}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flwr==1.41.0
export PATH="$folder/venv/bin:$PATH" FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir -p "$folder/home" "$folder/app/failing"
printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' "$port" \
  > "$folder/home/config.toml"
cat > "$folder/app/pyproject.toml" <<'TOML'
[project]
name = "failing"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "failing.server:app"
clientapp = "failing.client:app"

[tool.flwr.app.config]
TOML
touch "$folder/app/failing/__init__.py"
cat > "$folder/app/failing/client.py" <<'PYTHON'
from flwr.clientapp import ClientApp

app = ClientApp()
PYTHON
cat > "$folder/app/failing/server.py" <<'PYTHON'
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    raise ValueError("the aggregation went wrong")
PYTHON
flower-superlink --insecure --port "$port" --disable-runtime-dependency-installation > "$folder/link.log" 2>&1 &
link=$!
for _ in $(seq 300); do
  python3 -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null && break
  sleep 0.2
done
code=0
flwr run "$folder/app" here --stream > "$folder/run.log" 2>&1 || code=$?
status=$(flwr list here --format json 2>/dev/null | python3 -c 'import json, sys; print(json.load(sys.stdin)["runs"][0]["status"])')
grep -q "unhandled exception occurred in the ServerApp" "$folder/run.log" || { tail -20 "$folder/run.log"; exit 1; }
echo "flwr run --stream: exit code $code, the log has the ServerApp's error; flwr list: $status"
[ "$code" = 0 ] && [ "$status" = finished:failed ] || { echo "this has changed"; exit 1; }
