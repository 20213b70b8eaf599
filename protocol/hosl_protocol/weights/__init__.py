"""The device's trainable weights: probes and updates in place, AdamW, and the digest that proves them equal."""
