"""Guarded buffers: every tensor of a launch lies between redzones, and every byte that it must not change is
watched."""

from kernelfuzz.fuzz.buffers.buffers import REDZONE, Buffers, Memory, sentinel
from kernelfuzz.fuzz.buffers.watch import Guarded, StrayWrite, bits

__all__ = ["REDZONE", "Buffers", "Guarded", "Memory", "StrayWrite", "bits", "sentinel"]
