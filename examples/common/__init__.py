"""What all programs share: intervals of what was measured, and tables."""
