"""A run's figures for programs that draw them."""
