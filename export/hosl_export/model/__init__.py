"""A model, cut in two, made trainable, and joined again. Nothing here reads or writes a file.

The cloud shares most of it: it runs a tail of `halves`, puts adapters into it with `lora`, and at a merge joins the
halves with `joining` and writes what `peft_files` makes. `trainable`, `rope` and the drawing of a prompt are the
exporter's alone.
"""
