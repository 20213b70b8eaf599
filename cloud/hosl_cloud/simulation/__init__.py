"""A whole fleet in one process, and the baselines of the papers."""
