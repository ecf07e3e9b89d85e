"""The parts of the reference trainer behind ``examples/miniseries.py``."""
