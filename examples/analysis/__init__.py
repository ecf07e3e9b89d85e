"""What a trained miniseries amounts to: scaling laws, costs, CORE and one report."""
