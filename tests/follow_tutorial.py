"""Follows docs/tutorial.md to the letter: writes its files, makes its edits, runs its commands, compares their output.

python tests/follow_tutorial.py FOLDER        with the Python that has kernelfuzz
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
ANYTHING = "…"


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Return the page's code blocks: language, title, content."""
    pattern = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    return [(match[1], match[2] or "", match[3]) for match in pattern.finditer(text)]


def follow(folder: Path) -> list[str]:
    """Do in a folder what the tutorial says; return the commands that were run.

    Raises AssertionError where something else happens than the page says.
    """
    ran = []
    for language, title, content in blocks(TUTORIAL.read_text()):
        if language == "python":
            (folder / title).write_text(content)
        elif language == "diff":
            edit(folder / title, content)
        elif language == "console":
            for command, expected in commands(content):
                compare(command, expected, run(folder, command))
                ran.append(command)
    return ran


def edit(file: Path, diff: str) -> None:
    """Replace the lines with a minus by those with a plus."""
    old, new = ("".join(line[1:] for line in diff.splitlines(True) if line[0] == sign) for sign in "-+")
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has not exactly one\n{old}"
    file.write_text(text.replace(old, new))


def commands(content: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a block, each with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in content.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def run(folder: Path, command: str) -> str:
    """Run a command with this Python's programs first on the path; return what it prints."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "HYPOTHESIS_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])
    environment = {**own, "PATH": path, "COLUMNS": "80"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def compare(command: str, expected: list[str], output: str) -> None:
    """Check that the lines stand in the output, one below the other; between them may be others only where the page
    says so."""
    lines = [line.rstrip() for line in output.splitlines()]
    place, may_skip = 0, False
    for wanted in expected:
        if wanted == ANYTHING:
            may_skip = True
            continue
        # A summary line is framed by as many signs as fit.
        pattern = re.escape(wanted.rstrip()).replace(re.escape(ANYTHING), ".*")
        fits = [i for i in range(place, len(lines)) if re.fullmatch(rf"(?:=+ )?{pattern}(?: =+)?", lines[i])]
        assert fits, f"$ {command}\nhas no further line\n{wanted}\nin\n{output}"
        assert may_skip or fits[0] == place, f"$ {command}\nprints before\n{wanted}\nin\n{output}"
        place, may_skip = fits[0] + 1, False


if __name__ == "__main__":
    for each in follow(Path(sys.argv[1])):
        print(f"as the page says: {each}")
