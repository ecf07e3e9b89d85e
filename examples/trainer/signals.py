"""Stop at a safe point: the first signal is remembered, the second ends the process at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import NoReturn

from trainer.errors import RunInterruptedError

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a question asked at safe points.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(stop.requested)
        True
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signum is not None

    def check(self) -> None:
        """Leave the run if a signal has arrived.

        Raises:
            RunInterruptedError: a signal has arrived.
        """
        if self._signum is not None:
            self.leave()

    def leave(self) -> NoReturn:
        """Leave the run, also for a signal that another process of it has got.

        Raises:
            RunInterruptedError: always.
        """
        raise RunInterruptedError(self._signum or signal.SIGTERM)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum is not None:
            os._exit(128 + signum)  # asked twice: the last checkpoint on disk is whole
        self._signum = signum

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
