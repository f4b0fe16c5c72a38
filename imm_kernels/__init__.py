"""Triton kernels and their launchers, one file an op. Pure functions of tensors that know nothing of ``imm``."""

#: The largest M of the MMD losses.
LARGEST_SET = 256
