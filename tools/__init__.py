"""Scripts that measure this repository. They import no product, and tests assert their figures."""
