"""The tests compute with one thread: torch's threads spin, and wait long where a core is taken."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
