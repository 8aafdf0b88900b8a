"""Kernels that know tensors and numbers only: Triton for GPUs, Numba for CPUs, plain torch as the reference."""

from . import numba_cache  # noqa: F401  (before any kernel is made)
