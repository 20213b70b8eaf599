"""What a run is, as both sides know it: bundle, settings, task, and the order of the data."""
