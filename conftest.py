"""What the project's own tests share; their settings: the same examples in every run, kept nowhere, no deadline."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("own-tests", deadline=None, database=None, derandomize=True, print_blob=False)
settings.load_profile("own-tests")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Has torch use one thread: for small tensors others would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
