"""What the three commands share: options, exit codes, logs, signals, and the way through a proxy."""
