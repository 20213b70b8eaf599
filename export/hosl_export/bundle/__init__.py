"""A bundle's files: written, and checked against the uncut model."""
