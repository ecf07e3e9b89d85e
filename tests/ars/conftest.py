"""What the tests of the optimizers share: with this file, those below import the helpers here."""
