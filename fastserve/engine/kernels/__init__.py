"""Kernels: in C++ for CPUs (built at the first start where a compiler is, cached, called through ctypes), in Triton for
GPUs."""
