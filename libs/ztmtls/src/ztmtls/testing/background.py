"""The Workload API for tests that have no event loop: it runs in one of its own, on a thread."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar, overload

from .attestation import Attestation
from .workload_api import WorkloadApi

T = TypeVar("T")


class BackgroundWorkloadApi:
    """A `WorkloadApi` on a thread of its own, for plain synchronous code.

    Whatever is done with `api` and its workloads has to run on that thread: `run` takes it there.

        with BackgroundWorkloadApi() as background:
            orders = background.run(lambda: background.api.add_workload("orders", orders_id, ca=ca))
            background.run(lambda: orders.allow(pid=os.getpid()))
            ...
            background.run(orders.rotate)

    Arguments are those of `WorkloadApi`.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        on_attest: Callable[[Attestation], None] | None = None,
    ) -> None:
        self.api = WorkloadApi(directory, on_attest=on_attest)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BackgroundWorkloadApi:
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="workload-api", daemon=True)
        self._thread.start()
        try:
            self.run(self.api.start)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.run(self.api.close)
        finally:
            self._stop()

    @overload
    def run(self, action: Callable[[], Awaitable[T]], timeout: float = ...) -> T: ...

    @overload
    def run(self, action: Callable[[], T], timeout: float = ...) -> T: ...

    def run(self, action: Callable[[], Awaitable[T] | T], timeout: float = 10.0) -> T:
        """Call `action()` on the API's thread, wait for what it returns, and return it.

        Raises what it raises, and `TimeoutError` after `timeout` seconds.
        """
        if self._loop is None:
            raise RuntimeError("the Workload API is not started: use 'with'")

        async def there() -> T:
            async with asyncio.timeout(timeout):
                result = action()
                return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(there(), self._loop).result()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        assert loop is not None
        assert self._thread is not None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()
