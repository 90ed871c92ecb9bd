"""The start of a server around SGLang's own launch, and servers as child processes.

Environment checks, the fork server of CPU engines, the sidecar and coordinator that run beside a
server, and the clean-up after it. Imported by `launch_server`, `cli`, patches and `training`.
"""
