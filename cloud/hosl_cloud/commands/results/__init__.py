"""Commands for what a run has trained."""
