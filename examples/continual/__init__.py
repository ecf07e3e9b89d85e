"""The parts of continual_digits.py: permuted digits, learned one permutation after another."""
