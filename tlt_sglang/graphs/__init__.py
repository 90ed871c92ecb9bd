"""CUDA graphs of many strategies: what to capture under a budget (pure), and the pool of them."""
