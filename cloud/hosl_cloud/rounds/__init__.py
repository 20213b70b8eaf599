"""Rounds and evaluations as generators without I/O, and what they average."""
