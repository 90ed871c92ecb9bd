"""What the product needs of SGLang's objects, named once.

`protocols` lists the attributes, private ones among them, of workers, batches and inputs that are
relied on: an upgrade of SGLang has to check these. Imports nothing of SGLang.
"""
