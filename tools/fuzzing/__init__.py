"""Random requests against a live server: `make fuzz`.

`values` draws the requests from SGLang's own OpenAPI schema, `run` sends them and checks what the
server answers and what it is afterwards, `__main__` starts a server for an hour of it.
"""
