#!/usr/bin/env bash
# flwr 1.41.0: `run_simulation` passes an error of the ServerApp on to its caller, unless the caller is handling an
# exception of its own at that moment. Called from an `except` block (run again after a failure, say), it returns as if
# the run had gone well: the ServerApp's error is only in the log. The check that is to keep one exception from hiding
# another looks at whichever is being handled, the caller's among them.
#
# Seen: called plainly: ZeroDivisionError
#       called in an except block: returned normally
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "flwr[simulation]==1.41.0" "ray==2.55.1"
cat > "$folder/look.py" <<'PYTHON'
import logging

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

logging.getLogger("flwr").setLevel(logging.CRITICAL)


def outcome() -> str:
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise ZeroDivisionError("of the ServerApp")

    try:
        run_simulation(server, ClientApp(), num_supernodes=1)
    except ZeroDivisionError as error:
        return type(error).__name__
    return "returned normally"


plainly = outcome()
try:
    raise KeyError("the caller's own, long since dealt with")
except KeyError:
    within = outcome()
print("called plainly:", plainly)
print("called in an except block:", within)
assert (plainly, within) == ("ZeroDivisionError", "returned normally"), "this has changed"
PYTHON
FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/look.py" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
