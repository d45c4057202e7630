"""Reproducers: standalone scripts that show a failure again without kernelfuzz.

A script gets the kernel (`kernels`), makes the tensors of the case (`literals`), calls the kernel, and says whether the
bug is there: by what the outputs must hold (`references`), or by what else the kind of failure asks for (`script`).
"""

from kernelfuzz.fuzz.reproducer.script import script

__all__ = ["script"]
