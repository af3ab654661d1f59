"""GGUF files (llama.cpp): their header, and the model folder that follows from it."""
