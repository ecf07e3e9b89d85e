"""The one step of an optimizer, and its implementations; :mod:`ars.step.choose` chooses."""
