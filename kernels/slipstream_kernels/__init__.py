"""Kernels that know tensors and numbers only: Triton for GPUs, Numba for CPUs, plain torch as the reference."""
