"""Triton kernels for CUDA, each proved against a torch reference in Triton's interpreter."""
