"""The tail on several processes."""
