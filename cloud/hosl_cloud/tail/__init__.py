"""The tail: built, trained, kept as checkpoints, and merged into a Hugging Face model."""
