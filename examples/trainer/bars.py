"""How often a progress bar is drawn."""

import sys

__all__ = ["QUIET_SECONDS", "drawing_interval"]

QUIET_SECONDS = 1.0  # what takes less, and is no training, is not worth a bar
_TERMINAL_SECONDS = 0.2


def drawing_interval(in_file: float = 15.0) -> float:
    """Seconds between two drawings.

    Args:
        in_file: the same where standard error is no terminal: in a log file every drawing stays.
    """
    return _TERMINAL_SECONDS if sys.stderr.isatty() else in_file
