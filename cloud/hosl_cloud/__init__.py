"""The trainer service: holds the tail, backpropagates through it, and keeps what devices are sent."""
