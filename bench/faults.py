"""What a run survives: damages, kills, signals, full and read-only disks, hostile clouds, files and run directories.

    python -m bench.faults [--kinds damages,clouds,...] [--inputs 100000] [--seed 1]

Each kind is a number of trials. A trial *survives* where it ends in one of the ways that the program knows: it goes on
as if nothing had been, or one sentence says what is wrong (exit code 2, or 1 and resumable). It is *lost* where it ends
in a traceback, hangs, or goes on with another number. Prints a table, and exits with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2

from untether.clients.cloud import answer, dialect, faults
from untether.clients.cloud.client import CloudClient
from untether.clients.device.augmentation import samples_requests
from untether.sim.core import strict_json, text
from untether.sim.core.errors import ResumableStop, UserError
from untether.sim.core.records import Interaction
from untether.sim.experiment import Experiment
from untether.sim.experiment.endpoint import check_url, without_credentials
from untether.sim.population.dates import calendar_key, parse_date
from untether.sim.population.lamp import read_lamp
from untether.sim.population.tasks import get_task
from untether.sim.prompts.protocol import NotARequest, parse_request, parse_samples
from untether.sim.run.directory import RunDirectory

SMALL = {
    "population.users": "2", "population.tasks": "LaMP_3", "population.queries": "2", "cloud.samples": "4",
    "training.steps": "2", "arms": "local,collaborative", "evaluation.resamples": "100", "engine.workers": "1",
}  # fmt: skip

Found = Iterator[tuple[str, bool]]
"""(what was tried, whether it survived)"""


def command(*words: str, limit_s: float = 600, **options: object) -> subprocess.CompletedProcess[str]:
    """The `untether` command, as a user runs it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "untether", *words], capture_output=True, text=True, timeout=limit_s, env=environment,
        **options,
    )  # fmt: skip


def settings(values: dict[str, str]) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def survived(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a command ended as one may: done, or with a sentence and no traceback."""
    said = done.stdout + done.stderr
    return done.returncode in (0, 1, 2) and "Traceback" not in said and "defect" not in said


# --- parsers: many small inputs ---------------------------------------------------------------------------------

PIECES = (
    "{", "}", "[", "]", '"', ":", ",", "null", "true", "-1", "1e999", "NaN", "\\ud800", "\x00", "\x1b[2J", "é",
    "\ufeff", '"choices"', '"message"', '"content"', '"error"', '"samples"', '"input"', '"output"', '"usage"',
    "<think>", "</think>", "data: ", "\n", "Task: LaMP_4 (x)", "one JSON object a line:\n", "End of samples.\n",
    "2015-02-30", "9" * 50, "[" * 300, "https://", "@", "?key=", "seed", "temperature", "try again in 5s", "=", "# ",
    "cloud.samples", "lora.rank", " ",
)  # fmt: skip


def parsers(inputs: int, draw: random.Random) -> Found:
    """Text of pieces that mean something to some parser, in each of them."""
    tried: dict[str, Callable[[str], object]] = {
        "answers": lambda word: answer.read_answer(word.encode("utf-8", "surrogatepass")),
        "samples": parse_samples,
        "requests": lambda word: parse_request([{"role": "user", "content": word}]),
        "errors": lambda word: faults.words(faults._read(word.encode("utf-8", "replace")), {"messages": []}),
        "changes": lambda word: dialect.named_change(word, "", {"messages": [], "seed": 1}),
        "waits": faults.wait_in_words, "json": strict_json.loads, "dates": parse_date, "keys": calendar_key,
        "unwrapped": answer.unwrapped, "shown": text.shown, "addresses": lambda word: (check_url(word),),
        "hosts": without_credentials,
        "experiments": lambda word: Experiment.read(None, {"cloud.model": word, "population.users": word}),
    }  # fmt: skip
    for number in range(inputs):
        name = list(tried)[number % len(tried)]
        word = "".join(draw.choices(PIECES, k=draw.randint(0, 14)))
        try:
            tried[name](word)
            yield name, True
        except (UserError, NotARequest, ValueError) as error:
            yield name, not isinstance(error, UnicodeError)
        except Exception as error:
            print(f"lost: {name} {type(error).__name__}: {error} on {word[:80]!r}", file=sys.stderr)
            yield name, False


# --- data files -------------------------------------------------------------------------------------------------


def files(inputs: int, draw: random.Random) -> Found:
    """LaMP files of which one value, or some bytes, are something else."""
    odd = (None, "", [], {}, True, 1e30, -1, "\x00", "\ud800", ["a"], {"a": 1}, 10**30, "x" * 10_000)
    for number in range(inputs):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "LaMP_4"
            root.mkdir()
            ask = "Generate a headline for the following article: "
            profile = [
                {"id": str(k), "text": f"text {k}", "title": f"title {k}", "date": "2015-02-01"} for k in range(4)
            ]
            questions = [{"id": str(u), "input": f"{ask}news {u}", "profile": list(profile)} for u in range(2)]
            outputs = {"task": "LaMP_4", "golds": [{"id": str(u), "output": f"headline {u}"} for u in range(2)]}
            place = draw.choice([questions[0], questions[0]["profile"][1], outputs, outputs["golds"][1]])
            place[draw.choice(list(place))] = draw.choice(odd)
            raw = [json.dumps(questions).encode(), json.dumps(outputs).encode()]
            if number % 3 == 0:
                which = draw.randrange(2)
                at = draw.randrange(len(raw[which]))
                raw[which] = raw[which][:at] + draw.randbytes(draw.randint(0, 4)) + raw[which][at + 1 :]
            (root / "dev_questions.json").write_bytes(raw[0])
            (root / "dev_outputs.json").write_bytes(raw[1])
            try:
                read_lamp(root)
                yield "lamp", True
            except UserError:
                yield "lamp", True
            except Exception as error:
                print(f"lost: file {type(error).__name__}: {error}", file=sys.stderr)
                yield "lamp", False


# --- clouds -----------------------------------------------------------------------------------------------------


def clouds(draw: random.Random) -> Found:
    """Endpoints that answer what no endpoint should, each asked for samples."""
    good = json.dumps({"samples": [{"input": "in", "output": "out"}]})
    whole = {"choices": [{"message": {"role": "assistant", "content": good}, "finish_reason": "stop"}]}
    odd = (None, [], {}, "", 5, True, [[]], {"a": {}}, "x" * 200_000, -1e30)
    bodies: list[tuple[int, bytes]] = [(200, b""), (200, b"<html>"), (200, b"\xff" * 50), (200, b"[" * 5000)]
    for status in (200, 400, 401, 404, 422, 429, 500, 503):
        bodies += [(status, json.dumps(value).encode()) for value in (None, [], {}, "no", 7, {"error": None})]
        bodies += [(status, json.dumps({"error": value}).encode()) for value in odd]
    for name in ("content", "finish_reason", "refusal", "usage", "model", "choices", "message"):
        for value in odd:
            body = json.loads(json.dumps(whole))
            holder = {"content": "message", "refusal": "message"}.get(name)
            target = body["choices"][0] if name in ("finish_reason", "message") else body
            (body["choices"][0]["message"] if holder else target)[name] = value
            bodies.append((200, json.dumps(body).encode()))
    task = get_task("LaMP_4")
    items = [Interaction("i", "LaMP_4", "an article", "a headline")]
    order = samples_requests(task, items, 2, request_id="r", device_id="d", seed=1, round=0)
    for status, body in bodies:
        with _endpoint(status, body) as url:
            values = {"cloud.provider": "openai", "cloud.model": "m", "cloud.base_url": url, "cloud.max_retries": "1"}
            section = Experiment.read(None, values).cloud
            try:
                CloudClient(section, backoff_s=0.001, max_wait_s=0.1, api_key="k").ask_sync(order)
                yield "clouds", True
            except (UserError, ResumableStop):
                yield "clouds", True
            except Exception as error:
                print(f"lost: cloud {status} {type(error).__name__}: {error} {body[:80]!r}", file=sys.stderr)
                yield "clouds", False


@contextlib.contextmanager
def _endpoint(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def gateway(requests: int, draw: random.Random) -> Found:
    """An endpoint of our own under 100 clients at once, one request in five malformed: no answer may be a 5xx."""
    from untether.server.gateway import start_background

    items = [Interaction(str(k), "LaMP_4", f"One {k}. Two {k}. Three {k}.", f"title {k}") for k in range(4)]
    [order] = samples_requests(get_task("LaMP_4"), items, 2, request_id="r", device_id="d", seed=1, round=0)
    odd = ("", "{", "[]", '{"model": 5}', '{"model": "recombine", "messages": "x"}', "[" * 900, "\x00", '{"n": 1e400}')

    async def ask_all(url: str) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []
        waiting = [number % 5 == 0 for number in range(requests)]
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:

            async def work() -> None:
                while waiting:
                    broken = waiting.pop()
                    body = {"model": "recombine", "messages": list(order.messages), "seed": len(waiting)}
                    content = draw.choice(odd) if broken else json.dumps(body)
                    reply = await client.post(f"{url}/chat/completions", content=content.encode())
                    fine = 400 <= reply.status_code < 500 if broken else reply.status_code == 200
                    found.append(("malformed" if broken else "whole", fine))

            await asyncio.gather(*(work() for _ in range(100)))
        return found

    with start_background("recombine") as served:
        yield from asyncio.run(ask_all(served.base_url))


# --- command lines ----------------------------------------------------------------------------------------------


def commands(draw: random.Random) -> Found:
    """Words that no user should give, to each command, in this process."""
    from typer.testing import CliRunner

    from untether.sim.terminal.cli import app

    odd = ("", "-1", "nan", "1e999", "[", "../../x", "\udcff", "é" * 500, "{}", "=", "a=b=c", "/nonexistent")
    fields = ("lora.rank", "cloud.base_url", "population.path", "arms", "seeds", "privacy.redact", "nothing", "by_arm")
    runner = CliRunner()
    lines = [["experiment", "show", *settings({draw.choice(fields): word})] for word in odd for _ in range(3)]
    lines += [[name, word] for name in ("report", "study", "run") for word in odd]
    lines += [["export", word, "out", "--device", "d00000"] for word in odd]
    for line in lines:
        with contextlib.redirect_stderr(io.StringIO()):
            done = runner.invoke(app, line)
        fine = done.exception is None or isinstance(done.exception, (SystemExit, UserError, ResumableStop))
        if not fine:
            print(f"lost: untether {line} {type(done.exception).__name__}: {done.exception}", file=sys.stderr)
        yield "commands", fine


# --- runs: damages, kills, signals, disks -----------------------------------------------------------------------


def runs(draw: random.Random, folder: Path) -> Found:
    """A run that is stopped by each signal, killed, starved of disk; then its state damaged, and gone on with."""
    values = {**SMALL, "rounds": "3", "population.replay": "true"}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        path = folder / f"run-{number.name}"
        process = subprocess.Popen(
            [sys.executable, "-m", "untether", "run", "--out", str(path), *settings(values)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 300 and not list(path.glob("state/commits/*")):
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(number)
        said = process.communicate(timeout=120)[0]
        stopped = process.returncode == -signal.SIGKILL if number is signal.SIGKILL else process.returncode in (0, 1)
        done = command("run", "--resume", str(path))
        yield "signals", stopped and "Traceback" not in said and done.returncode == 0
    whole = RunDirectory.open(folder / "run-SIGINT").read("metrics")
    others = [RunDirectory.open(folder / f"run-{name}").read("metrics") for name in ("SIGTERM", "SIGHUP", "SIGKILL")]
    for other in others:
        yield "signals", other.equals(whole)

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    yield "disks", survived(command("run", "--out", str(folder / "full"), *settings(SMALL), preexec_fn=no_space))
    closed = folder / "closed"
    closed.mkdir(mode=0o500)
    yield "disks", survived(command("run", "--out", str(closed / "run"), *settings(SMALL)))


def damages(draw: random.Random, folder: Path) -> Found:
    """Every file of a stopped run, cut, emptied, zeroed, turned to junk and taken away, looked at before it goes on."""
    experiment = Experiment.read(None, {**SMALL, "rounds": "3", "population.replay": "true"})
    run = RunDirectory.create(folder / "damaged", experiment)
    seed = experiment.seeds[0]
    for round in (0, 1):
        part = run.write_part("metrics", seed, round, "learn-0", [{"device_id": "d00000", "value": 1.0}] * 50)
        run.commit(seed, round, {"metrics": [part]}, {"totals": {}}, carried={"round": round})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for path, content in before.items():
        for damage in (content[: len(content) // 2], b"", bytes(len(content)), draw.randbytes(len(content)), None):
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_bytes(damage)
            try:
                again = RunDirectory.open(run.path)
                again.check_resumable()
                again.check_state()
                fine = [again.committed(seed, round) is not None for round in (0, 1)] in ([True, True], [True, False])
                if not fine:
                    print(f"lost: {path.name}: unseen", file=sys.stderr)
                yield "damages", fine
            except UserError as error:
                named = path.name in str(error) or "another version" in str(error)
                if not named:
                    print(f"lost: {path.name}: {error}", file=sys.stderr)
                yield "damages", named
            except Exception as error:
                print(f"lost: {path.name} {type(error).__name__}: {error}", file=sys.stderr)
                yield "damages", False
            path.write_bytes(content)


def main() -> None:
    """Runs the kinds that are asked for and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="parsers,files,clouds,gateway,commands,damages,runs")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    draw = random.Random(told.seed)
    tried: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds: dict[str, Callable[[], Found]] = {
            "parsers": lambda: parsers(told.inputs, draw), "files": lambda: files(told.inputs // 100, draw),
            "clouds": lambda: clouds(draw), "gateway": lambda: gateway(told.inputs // 10, draw),
            "commands": lambda: commands(draw), "damages": lambda: damages(draw, folder),
            "runs": lambda: runs(draw, folder),
        }  # fmt: skip
        for kind in told.kinds.split(","):
            for what, fine in kinds[kind]():
                tried[f"{kind}: {what}"] += 1
                lost[f"{kind}: {what}"] += not fine
    print(f"| {'kind':24} | tried | survived | lost |\n|---|---|---|---|")
    for what, count in sorted(tried.items()):
        print(f"| {what:24} | {count} | {count - lost[what]} | {lost[what]} |")
    print(f"| {'all':24} | {sum(tried.values())} | {sum(tried.values()) - sum(lost.values())} | {sum(lost.values())} |")
    sys.exit(1 if sum(lost.values()) else 0)


if __name__ == "__main__":
    main()
