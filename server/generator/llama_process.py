"""llama.cpp's own server in a process of its own, as `llama_cpp` starts it.

A fault in native code ends this process and no other. It announces its address as one JSON line on stdout, prints
nothing else there, and ends with its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("options", type=json.loads)
    parser.add_argument("parent", type=int)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to decide on
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp prints belongs to the log
    try:
        server = _server(**given.options)
        print(json.dumps({"address": server.listening_address}), file=said, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{error}"}), file=said, flush=True)
        os._exit(1)
    while os.getppid() == given.parent:
        threading.Event().wait(0.5)
    os._exit(0)


def _server(model: str, context: int, slots: int, threads: int):
    import xllamacpp

    told = xllamacpp.CommonParams()
    told.model.path = model
    told.n_ctx, told.n_parallel, told.n_predict = context * slots, slots, -1
    told.hostnames, told.port = ["127.0.0.1"], 0
    for processor in (told.cpuparams, told.cpuparams_batch):
        # Threads that wait in a loop take the cores from whoever has work: a machine that also trains is busy.
        processor.n_threads, processor.poll = threads, 0
    told.warmup, told.verbosity, told.ui = False, 0, False
    told.use_jinja = True
    return xllamacpp.Server(told)


if __name__ == "__main__":
    main()
