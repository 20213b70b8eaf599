"""The machine and its people: temperature, memory, terminal, systemd, status."""
