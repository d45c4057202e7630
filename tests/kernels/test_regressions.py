"""The data of the historical bugs: every edit fits its release, and nothing touches the cache."""

import re
from pathlib import Path

import pytest

from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.fuzz.verdict import KINDS
from kernelfuzz.kernels import registry, releases
from kernelfuzz.kernels.base import KernelName
from kernelfuzz.kernels.regressions import REGRESSIONS, Edit, edited, find
from kernelfuzz.strategies.errors import KernelfuzzError

EDITED = [regression for regression in REGRESSIONS if regression.bad.edits]


def test_there_are_the_five_bugs():
    assert [each.pull_request for each in REGRESSIONS] == [39989, 40109, 40131, 43646, 44005]
    assert [each.pull_request for each in EDITED] == [40109, 43646, 44005]


@pytest.mark.parametrize("regression", REGRESSIONS, ids=lambda each: str(each.pull_request))
def test_each_names_what_there_is(regression):
    assert find(str(regression.pull_request)) is regression
    assert find(f"#{regression.pull_request}") is regression
    assert get_target(regression.target)
    implementation = registry.find(regression.target, KernelName(regression.kernel))
    assert implementation is not None
    assert implementation.releases[0] == regression.package
    assert set(regression.devices or implementation.devices) <= set(implementation.devices)
    assert not regression.good.edits
    assert regression.symptoms
    assert {symptom.kind for symptom in regression.symptoms} <= set(KINDS)


def test_an_unknown_one_is_refused_with_those_there_are():
    with pytest.raises(
        KernelfuzzError, match=r"no regression 12345: expected one of 39989, 40109, 40131, 43646, 44005"
    ):
        find("12345")


@pytest.mark.parametrize("regression", EDITED, ids=lambda each: str(each.pull_request))
def test_an_edited_release_differs_in_its_edits_only(regression):
    side = regression.bad
    try:
        root = releases.locate(regression.package, side.version)
    except KernelfuzzError as error:
        pytest.skip(str(error))
    before = {edit.file: (root / edit.file).read_text() for edit in side.edits}
    with edited(root, side.edits) as tree:
        assert tree != root
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = str(path.relative_to(root))
                copy = tree / name
                if name in before:
                    assert not copy.is_symlink()
                    assert copy.read_text() != before[name]
                else:
                    assert copy.is_symlink()
                    assert copy.resolve() == path.resolve()
        assert releases.version_of(tree, regression.package) == side.version
    assert not tree.exists()
    assert {name: (root / name).read_text() for name in before} == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small tree."""
    tree = tmp_path / "1.0"
    (tree / "package").mkdir(parents=True)
    (tree / "package" / "once.py").write_text("a = 1\nb = 2\nb = 3\n")
    return tree


def test_without_edits_the_release_itself_is_given(root):
    with edited(root, ()) as tree:
        assert tree == root


def test_edits_of_one_file_add_up(root):
    edits = (Edit("package/once.py", "a = 1\n", ""), Edit("package/once.py", "b = 2", "b = 4"))
    with edited(root, edits) as tree:
        assert (tree / "package" / "once.py").read_text() == "b = 4\nb = 3\n"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("package/once.py", "c = 1\nd", ""), "cannot edit package/once.py of {root}: it contains 'c = 1' 0 times"),
        (Edit("package/once.py", "b = ", ""), "cannot edit package/once.py of {root}: it contains 'b =' 2 times"),
        (Edit("package/gone.py", "a", ""), "cannot edit package/gone.py of {root}: No such file or directory"),
    ],
)
def test_an_anchor_that_is_not_there_exactly_once_is_refused(root, edit, message):
    with pytest.raises(KernelfuzzError, match=re.escape(message.format(root=root))), edited(root, (edit,)):
        pytest.fail("it was edited")
    assert (root / "package" / "once.py").read_text() == "a = 1\nb = 2\nb = 3\n"
