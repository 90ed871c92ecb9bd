"""Patches of the shape that updates weights in its model runner, and speculates on GPUs alone."""
