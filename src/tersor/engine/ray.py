"""The engine on a Ray cluster, local or remote: the same units, sent with their arguments, each on one core.

A unit whose worker dies is run again elsewhere. A cluster that this process started ends with it; one that was there
before stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from tersor.errors import TersorError

RETRIES = 3  # of a unit whose worker died


class RayPool:
    """A Ray cluster as a pool: that at `address`, or one of `workers` cores on this machine."""

    def __init__(self, workers: int, address: str | None = None) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError as error:
            raise TersorError('The engine ray is not installed; `pip install "tersor[ray]"` brings it.') from error
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            options: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": workers}
            if not address:
                options["include_dashboard"] = False
            try:
                ray.init(**options, log_to_driver=False, logging_level="ERROR", configure_logging=True)
            except Exception as error:
                where = f"at {address}" if address else "on this machine"
                reason = " ".join(str(error).split())[:200].rstrip(".")
                raise TersorError(f"Ray cannot be used {where}: {reason}.") from error
        self._unit = ray.remote(num_cpus=1, max_retries=RETRIES)(_unit)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        found: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            if not found.set_running_or_notify_cancel():
                return
            error = done.exception()
            if error is None:
                found.set_result(done.result())
            else:
                found.set_exception(self._cause(error))

        self._unit.remote(function, *arguments).future().add_done_callback(settle)
        return found

    def share(self, value: Any) -> Any:
        """An argument of many units, sent once to every machine that runs one."""
        return self._ray.put(value)

    def _cause(self, error: BaseException) -> BaseException:
        """What a unit raised, without Ray around it."""
        if isinstance(error, self._ray.exceptions.WorkerCrashedError):
            return TersorError(
                f"A worker of Ray died {RETRIES + 1} times over the same unit, for want of memory perhaps."
            )
        return getattr(error, "cause", None) or error

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


def _unit(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)
