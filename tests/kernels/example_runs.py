"""The runs of test_examples.py, which starts this file in an interpreting process of its own.

    TRITON_INTERPRET=1 python example_runs.py RESULTS

writes as JSON, for each target, how the correct build did on each of its cases, and for each bug the failures of the
first case that shows it and those of the correct build on that same case.
"""

import json
import sys
from pathlib import Path

import torch
from hypothesis import Phase, given, settings

from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import get_target
from kernelfuzz.kernels.examples import bgmv, moe_lora_align
from kernelfuzz.strategies.case import to_json

EXAMPLES = {"moe_lora_align": moe_lora_align, "bgmv": bgmv}
CPU = torch.device("cpu")
CORRECT_CASES = 150
BUGGY_CASES = 300


def draw(target, count):
    cases = []

    @settings(max_examples=count, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
    @given(target.cases())
    def collect(case):
        cases.append(case)

    collect()
    return cases


def failures(target, kernel, case):
    """The failures of one case as [kind, output, clause]; no example may reject a case."""
    verdict = judge_alone(target, kernel, case, Conditions(CPU))
    assert not verdict.rejected, verdict.rejected
    return [[failure.kind, failure.output, failure.clause] for failure in verdict.failures]


def run(example, target):
    cases = draw(target, BUGGY_CASES)
    correct = example.load(None, CPU)
    result = {
        "versions": [correct.version, *(example.load(bug, CPU).version for bug in example.BUGS)],
        "correct": [
            {"case": to_json(case), "failures": failures(target, correct, case)} for case in cases[:CORRECT_CASES]
        ],
        "bugs": {},
    }
    for bug in example.BUGS:
        kernel = example.load(bug, CPU)
        for case in cases:
            if found := failures(target, kernel, case):
                result["bugs"][bug] = {"failures": found, "correct_build": failures(target, correct, case)}
                break
    return result


if __name__ == "__main__":
    results = {name: run(example, get_target(name)) for name, example in EXAMPLES.items()}
    Path(sys.argv[1]).write_text(json.dumps(results), "utf-8")
