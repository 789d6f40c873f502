"""Kernels and memory for CPUs only."""
