"""The commands of `hosl-cloud`."""
