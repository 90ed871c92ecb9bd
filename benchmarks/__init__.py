"""The benchmarks: `bench_*.py` are programs, `harness` is what they share; see README.md here.

Nothing in the product imports this package. No benchmark imports another one.
"""
