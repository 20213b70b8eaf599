"""A model, cut in two, made trainable, and joined again."""
