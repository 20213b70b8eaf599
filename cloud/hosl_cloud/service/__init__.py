"""The service: one port, what it answers on it, and who may ask."""
