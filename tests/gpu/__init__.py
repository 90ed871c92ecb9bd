"""Tests on a CUDA GPU, and `tests.gpu.run`, which checks and times everything on one."""
