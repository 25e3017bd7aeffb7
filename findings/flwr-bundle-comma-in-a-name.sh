#!/usr/bin/env bash
# flwr 1.41.0: `flwr build` bundles an app in whose folder a file has a comma in its path, and `flwr install` then refuses
# that very bundle with a bare "too many values": the list of contents in it is written and read as lines of three fields joined
# by commas, without quotes. `flwr run` ends the same way, in the log of the run alone. Folders named after settings
# (a=1,b=2), as parameter sweeps leave them beside an app, are enough.
#
# Seen: flwr build: ok; flwr install: too many values to unpack (expected 3); without the comma: installed
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet flwr==1.41.0
export PATH="$folder/venv/bin:$PATH" FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$folder/app/sweep" "$folder/app/results/rate=1,depth=2"
cat > "$folder/app/pyproject.toml" <<'TOML'
[project]
name = "sweep"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "sweep.apps:server"
clientapp = "sweep.apps:client"

[tool.flwr.app.config]
TOML
touch "$folder/app/sweep/__init__.py"
printf 'from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n\nclient = ClientApp()\nserver = ServerApp()\n' \
  > "$folder/app/sweep/apps.py"
echo 'score = 1.0' > "$folder/app/results/rate=1,depth=2/settings.toml"

try() { # builds the app in a new folder and installs the bundle there: what was said last
  mkdir "$folder/$1"
  (cd "$folder/$1" && flwr build --app "$folder/app" > build.log 2>&1) || { tail -5 "$folder/$1/build.log"; exit 1; }
  (cd "$folder/$1" && FLWR_HOME="$folder/$1/home" flwr install ./*.fab > install.log 2>&1) && echo installed && return
  grep -o "too many values to unpack (expected 3)" "$folder/$1/install.log" | tail -1 || true
}
with=$(try comma)
mv "$folder/app/results/rate=1,depth=2" "$folder/app/results/rate=1-depth=2"
without=$(try plain)
echo "flwr build: ok; flwr install: $with; without the comma: $without"
[[ "$with" == "too many values to unpack (expected 3)" ]] && [ "$without" = installed ] \
  || { cat "$folder"/*/install.log | tail -20; echo "this has changed"; exit 1; }
