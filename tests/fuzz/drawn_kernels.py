"""A `fused_moe_lora` by its own oracle, for tests of what is drawn and not of what is computed."""

from kernelfuzz.oracles.fused_moe_lora import expect


def fused(inputs, outputs):
    expectation = expect(inputs, dict(outputs))
    if expectation.error is not None:
        raise AssertionError(expectation.error.text)
    expected = expectation.outputs["output"]
    written = expected.mask("write")
    outputs["output"][written] = expected.values[written].to(outputs["output"].dtype)


def fused_wrong_with_two_tokens(inputs, outputs):
    """Writes to the first element of every output of two tokens and more."""
    fused(inputs, outputs)
    if inputs.case.size >= 2:
        outputs["output"][0, 0, 0] = 12345
