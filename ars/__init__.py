"""ARS optimizers: AdamW gated on the device, with inheritance penalties in the same pass."""
