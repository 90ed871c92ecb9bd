"""The benchmarks share these: programs, processes, statistics, prompts, workloads and result files.

`program` runs a benchmark as a command, `server` and `fleet` start and measure servers, `workload`
plays a rollout, `statistics` compares sides, and `provenance` writes a result with its origin. Only
benchmarks import this package, and it imports none of them.
"""
