"""GGUF, the one-file format of llama.cpp: its header, its families, its tokenizers; which values a quantization stands for is the `gguf` package's."""
