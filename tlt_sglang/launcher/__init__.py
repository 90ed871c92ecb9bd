"""What `python -m tlt_sglang.launch_server` needs around SGLang's own launch.

Environment checks, the fork server of CPU engines, the sidecar and coordinator that run beside a
server, and the cleaning up after it. Imported by `launch_server` and `cli` alone.
"""
