"""Masks of an expectation."""

import torch

from kernelfuzz.oracles.expectation import Clause, ExpectedOutput


def test_each_element_falls_under_the_rule_of_its_clause():
    clauses = (Clause("a", "write"), Clause("b", "keep"), Clause("c", "free"), Clause("d", "write"))
    region = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    expected = ExpectedOutput(clauses, region, torch.zeros(2, 2))
    assert expected.mask("write").tolist() == [[True, False], [False, True]]
    assert expected.mask("keep").tolist() == [[False, True], [False, False]]
    assert expected.mask("free").tolist() == [[False, False], [True, False]]


def test_an_empty_output_has_empty_masks():
    expected = ExpectedOutput((Clause("a", "write"),), torch.zeros((0, 3), dtype=torch.uint8), torch.zeros(0, 3))
    assert expected.mask("write").shape == (0, 3)
