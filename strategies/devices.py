"""Spellings of a device: the strings and objects that code under test may be given for one and the same device."""

import torch
from hypothesis import strategies as st

DeviceSpelling = str | torch.device


def device_spellings(device: torch.device | str) -> st.SearchStrategy[DeviceSpelling]:
    """Draw a spelling of `device`: "cuda", "cuda:0", torch.device("cuda"), torch.device("cuda:0"); the simplest is the
    bare string. The bare kind is drawn only for index 0, where it means the same device."""
    index = torch.device(device).index or 0
    kind = torch.device(device).type
    spellings: list[DeviceSpelling] = [] if index else [kind]
    spellings.append(f"{kind}:{index}")
    spellings += [torch.device(spelling) for spelling in spellings]
    return st.sampled_from(spellings)
