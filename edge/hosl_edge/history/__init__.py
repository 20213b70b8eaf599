"""The run as this device holds it: journal, snapshot, weights."""
