"""How TLT comes into a process of SGLang, whoever starts it.

`tlt_sglang_startup`, beside its `.pth` file at the top of site-packages, loads the plugin while
SGLang is being imported; `arguments` puts the strategy into SGLang's arguments, and `http_app` our
routes into its app. The plugin and patches import it.
"""
