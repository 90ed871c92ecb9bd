"""The pictures of the benchmarks, drawn from their results; matplotlib is imported when drawing."""
