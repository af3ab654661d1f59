"""Kernels: in C++ for CPUs (built at the first start if there is a compiler, cached, called through ctypes), in Triton
for GPUs."""
