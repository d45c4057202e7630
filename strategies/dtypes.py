"""The floating-point dtypes of activations and weights."""

from typing import Literal, get_args

Dtype = Literal["float16", "bfloat16"]
"""A 16-bit dtype by torch's name."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
