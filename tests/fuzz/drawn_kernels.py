"""A `fused_moe_lora` and a `lora_shrink_expand` by their own oracles, for tests of what is drawn and not of what is
computed."""

from kernelfuzz.oracles import fused_moe_lora, lora_shrink_expand


def _write(expectation, outputs):
    if expectation.error is not None:
        raise AssertionError(expectation.error.text)
    expected = expectation.outputs["output"]
    written = expected.mask("write")
    outputs["output"][written] = expected.values[written].to(outputs["output"].dtype)


def fused(inputs, outputs):
    _write(fused_moe_lora.expect(inputs, dict(outputs)), outputs)


def fused_wrong_with_two_tokens(inputs, outputs):
    """Writes to the first element of every output of two tokens and more."""
    fused(inputs, outputs)
    if inputs.case.size >= 2:
        outputs["output"][0, 0, 0] = 12345


def shrink_expand(inputs, outputs):
    _write(lora_shrink_expand.expect(inputs, dict(outputs)), outputs)


def shrink_wrong_from_hidden_5(inputs, outputs):
    shrink_expand(inputs, outputs)
    if inputs.case.hidden >= 5:
        _add_to_served_rows(inputs, outputs)


def shrink_wrong_from_odd_hidden_5(inputs, outputs):
    """Right where the hidden size is even."""
    shrink_expand(inputs, outputs)
    if inputs.case.hidden >= 5 and inputs.case.hidden % 2:
        _add_to_served_rows(inputs, outputs)


def _add_to_served_rows(inputs, outputs):
    outputs["output"][:, inputs.token_adapters >= 0] += 1000
