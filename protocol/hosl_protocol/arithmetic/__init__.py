"""Arithmetic that gives the same bits on every machine: directions, the lattice, and the pass over the weights."""
