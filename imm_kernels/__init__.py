"""Triton kernels and their launchers, one file an op. Pure functions of tensors that know nothing of ``imm``."""
