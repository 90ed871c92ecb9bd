"""The parts of `bench_adaptive_drafter`: processes, traffic, prompts, and the parts themselves."""
