"""The device's trainable weights, computed alike on every machine: directions, lattice, updates, digests."""
