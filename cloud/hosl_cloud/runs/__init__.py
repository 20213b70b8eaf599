"""Runs and their devices: the course of a run, who takes part, what is kept of it."""
