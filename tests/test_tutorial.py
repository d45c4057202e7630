"""The tutorial does what it says."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("follow_tutorial", Path(__file__).with_name("follow_tutorial.py"))
assert spec is not None
assert spec.loader is not None
tutorial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tutorial)


def test_every_block_of_the_tutorial_does_what_it_says(tmp_path):
    assert len(tutorial.follow(tmp_path)) == 6


@pytest.mark.parametrize(
    ("expected", "output", "fits"),
    [
        (["a", "b"], "a\nb\n", True),
        (["a", "b"], "a\nx\nb\n", False),
        (["a", "…", "b"], "a\nx\nb\n", True),
        (["…", "1 failed in …"], "x\n=== 1 failed in 0.5s ===\n", True),
        (["…", "1 failed in …"], "x\n=== 2 failed in 0.5s ===\n", False),
    ],
)
def test_another_output_is_noticed(expected, output, fits):
    if fits:
        tutorial.compare("command", expected, output)
        return
    with pytest.raises(AssertionError, match="command"):
        tutorial.compare("command", expected, output)
