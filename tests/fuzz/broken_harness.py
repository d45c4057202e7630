"""Kernels of `bgmv` in whose process the oracle is broken, as if by a mistake of ours."""

import os

from engine_kernels import rank, right

from kernelfuzz.oracles import bgmv

_expected = bgmv._product


def _broken(inputs, *rest):
    if rank(inputs.case) == 5:
        raise ZeroDivisionError("division by zero\nin the oracle")
    if rank(inputs.case) == 6:
        os._exit(9)
    return _expected(inputs, *rest)


bgmv._product = _broken

launch = right
