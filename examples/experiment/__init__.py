"""The experiment of examples/inheritance.py: its runs, and what they say."""
