"""The device's data: examples and pictures as they lie in files, and what the model is given of them."""
