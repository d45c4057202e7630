#!/usr/bin/env python3
"""A stand-in for compute-sanitizer: runs the program and checks nothing.

It takes the options that kernelfuzz gives the tool, each with one value, and refuses others as the tool does. The log
gets the banner and a summary; the program finds the log's path in FAKE_SANITIZER_LOG and appends what the tool would
report. Copy it to a folder on PATH as `compute-sanitizer`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

OPTIONS = {
    "--tool": ("memcheck", "racecheck", "initcheck"),
    "--log-file": None,
    "--target-processes": ("all", "application-only"),
    "--destroy-on-device-error": ("context", "kernel"),
    "--print-limit": None,
    "--show-backtrace": ("yes", "host", "device", "no"),
    "--launch-timeout": None,
    "--require-cuda-init": ("yes", "no"),
    "--report-api-errors": ("all", "explicit", "no"),
    "--padding": None,
    "--racecheck-report": ("all", "hazard", "analysis"),
    "--check-api-memory-access": ("yes", "no"),
}


def main(arguments):
    chosen = {}
    while arguments and arguments[0].startswith("--"):
        name, value, *arguments = arguments
        if name not in OPTIONS:
            print(f"unrecognised option '{name}'", file=sys.stderr)
            return 255
        if OPTIONS[name] is not None and value not in OPTIONS[name]:
            print(f"the argument ('{value}') for option '{name}' is invalid", file=sys.stderr)
            return 255
        chosen[name] = value
    escapes = {"%%": "%", "%p": str(os.getpid())}
    log = Path(re.sub("%.", lambda escape: escapes[escape.group()], chosen["--log-file"]))
    log.write_text("========= COMPUTE-SANITIZER\n")
    # The program inherits the descriptors that this process was given, as it does from the tool.
    program = subprocess.run(arguments, env={**os.environ, "FAKE_SANITIZER_LOG": str(log)}, close_fds=False)
    with log.open("a") as file:
        file.write("========= ERROR SUMMARY: 0 errors\n")
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
