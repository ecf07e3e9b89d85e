"""What the tests of the Fisher share."""

import pytest

from ars.regularizers.fisher import per_sample


@pytest.fixture(autouse=True)
def hooks_first(monkeypatch):
    """Let ``auto`` begin with the one pass: vmap is predicted to be faster for models so small.

    ``test_costs.py`` tests the prediction itself.
    """
    monkeypatch.setattr(per_sample, "fastest_on_cpu", lambda *_: "hooks")
