"""The parts of continual_digits.py: permuted digits or a few classes, task after task."""
