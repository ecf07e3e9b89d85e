"""The parts of the stress tests behind ``examples/narcissus.py``."""
