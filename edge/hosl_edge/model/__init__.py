"""The client half on ONNX Runtime, and the memory that it may take."""
