"""What other programs load: a model folder as a .gguf file for llama.cpp, and as a graph for ONNX Runtime."""
