"""Memory that ends at an unreadable page: one byte too far is a SIGSEGV."""

import ctypes
import mmap
import os

import torch

PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded_memory(size: int) -> torch.Tensor:
    """Return `size` bytes of CPU memory, uint8 zeros, rounded up to whole pages, with an unreadable page behind them.

    The mapping lives as long as the tensor's storage. Raises OSError where the system has no more memory or mappings.
    """
    length = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, length + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8, count=length)
    if _libc.mprotect(ctypes.c_void_p(memory.data_ptr() + length), ctypes.c_size_t(PAGE), _PROT_NONE):
        raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")
    return memory
