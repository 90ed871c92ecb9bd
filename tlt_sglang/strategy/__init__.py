"""What to speculate with, and how far: pure decisions, no torch, no clock, no I/O."""
