"""SGLang's objects, as far as the product needs them, named once.

`protocols` lists the attributes, private ones among them, of workers, batches and inputs that are
relied on: an upgrade of SGLang has to check these. Imports nothing of SGLang.
"""
