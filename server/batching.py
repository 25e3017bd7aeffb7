"""Micro-batching: requests that arrive together are answered by one call of a generator for which that is cheaper."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from untether.server.generator import Completion, GenerationRequest, Generator


class Batcher:
    """Gathers requests and hands them to `generator.generate` in a thread of its own, first come, first served.

    A batch holds the waiting requests, after `max_wait_s` from its first one at most `generator.max_batch` (or 16). A
    batch that fails is tried again one request at a time, so that only the failing request gets the error.
    """

    def __init__(self, generator: Generator, max_wait_s: float = 0.01) -> None:
        self._generator = generator
        self._max_wait_s = max_wait_s
        self._max_batch = int(getattr(generator, "max_batch", 16))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generator")
        self._queue: asyncio.Queue[tuple[GenerationRequest, asyncio.Future[Completion]]] = asyncio.Queue()
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, request: GenerationRequest) -> Completion:
        """Returns the completion of one request, or raises the error of its generation."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((request, answer))
        return await answer

    async def close(self) -> None:
        """Stops gathering; requests that still wait are cancelled."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self._queue.get()]
            if self._queue.qsize() + 1 < self._max_batch:
                await asyncio.sleep(self._max_wait_s)
            while len(waiting) < self._max_batch and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            waiting = [(request, answer) for request, answer in waiting if not answer.done()]  # the asker hung up
            if waiting:
                await self._answer(loop, waiting)

    async def _answer(self, loop: asyncio.AbstractEventLoop, waiting: list) -> None:
        try:
            batch = [request for request, _ in waiting]
            done = await loop.run_in_executor(self._thread, self._generator.generate, batch)
        except Exception as error:
            if len(waiting) == 1:
                if not waiting[0][1].done():
                    waiting[0][1].set_exception(error)
                return
            for entry in waiting:
                await self._answer(loop, [entry])
            return
        for (_, answer), completion in zip(waiting, done, strict=True):
            if not answer.done():
                answer.set_result(completion)
