"""The modules of vLLM's layers without the rest of vLLM: what is a placeholder, and what is emulated.

The releases' own modules are run in test_vllm_releases.py.
"""

import sys
from pathlib import Path

import numpy
import pytest
import torch

from kernelfuzz.kernels.base import WrongResultError, deliver
from kernelfuzz.kernels.vllm import host_code, placeholders
from kernelfuzz.kernels.vllm.platform import EmulatedPlatform
from kernelfuzz.kernels.vllm.stand_in import StandInLacksError
from kernelfuzz.strategies.errors import KernelfuzzError

LAYERS = "vllm.model_executor.layers"
TESTED = "fused_moe.moe_permute_unpermute"
NOT_NEEDED = ("cachetools", "compressed_tensors", "psutil", "pydantic", "regex", "requests", "transformers")
"""Packages that vLLM's modules import and, in what is tested, do not use."""

CODE = """\
from __future__ import annotations
import vllm.envs as envs
import vllm.surely.not_there as deep
from vllm.config import VllmConfig, configured
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv, unheard_of

Option = VllmConfig.Inner | None
every = [each for each in VllmConfig.members]
KEY = configured("key").with_dtype(torch_dtype="float16")

class Method(LinearBase):
    def __init__(self, moe, option: VllmConfig | None = None):
        super().__init__(moe, option)
        self.own = 1

    def hidden(self) -> Option:
        return self.moe

class Generic(deep.Base[int]):
    pass

@configured(level=3)
def decorated(x):
    return x

def right(n: VllmConfig.Size) -> int:
    return cdiv(n, 2)

def calls():
    return configured("late")

def calls_an_attribute():
    return VllmConfig.current.get(3)

def calls_what_a_stand_in_lacks():
    return unheard_of(3)

def calls_what_was_decorated():
    return decorated(3)
"""


def write(root: Path, name: str, code: str) -> None:
    """Write a module of the release under `root`."""
    file = root.joinpath(*name.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The folder of a vLLM that is imported as a release is, which is forgotten afterwards."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in before if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    host_code.import_from(tmp_path, EmulatedPlatform("cpu"))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", *NOT_NEEDED)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def module(release):
    """A module whose code is tested, of a vLLM with nothing else."""
    write(release, f"{LAYERS}.{TESTED}", CODE)
    return host_code.import_module(TESTED)


def test_what_is_not_tested_may_be_imported_inherited_from_and_named(module):
    assert module.right(5) == 3
    assert module.Method("a configuration", option=2).hidden() == "a configuration"
    assert module.Method("a configuration").own == 1
    assert isinstance(module.Generic(), module.Generic)
    assert module.every == []
    assert module.current_platform.is_cpu()
    assert module.envs.VLLM_BATCH_INVARIANT is False


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("calls", "vllm.config.configured"),
        ("calls_an_attribute", "vllm.config.VllmConfig.current.get"),
        ("calls_what_a_stand_in_lacks", "vllm.utils.math_utils.unheard_of"),
        ("calls_what_was_decorated", "vllm.config.configured()()"),
    ],
)
def test_to_call_what_is_not_there_is_an_error_that_names_it(module, function, what):
    with pytest.raises(StandInLacksError) as error:
        getattr(module, function)()
    assert str(error.value) == f"kernelfuzz has no stand-in for {what}, which the code under test came to"
    assert isinstance(error.value, KernelfuzzError), "it is no failure of the code's"


def test_while_modules_are_imported_placeholders_may_be_called(module):
    with placeholders.importing():
        with placeholders.importing():
            module.calls()
        module.calls()
    with pytest.raises(StandInLacksError):
        module.calls()


def test_they_may_not_be_called_any_more_after_an_import_that_failed(module, release):
    write(release, f"{LAYERS}.quantization.fp8", "1 // 0\n")
    with pytest.raises(ZeroDivisionError):
        host_code.import_module("quantization.fp8")
    with pytest.raises(StandInLacksError):
        module.calls()


@pytest.mark.parametrize("name", ["fused_moe.oracle.fp8", "quantization.online.fp8", "quantization.fp8"])
def test_a_module_that_the_release_has_not_is_none(module, name):
    assert host_code.import_module(name) is None


def test_a_package_that_a_tested_module_needs_and_that_is_not_installed_is_named(release):
    write(release, f"{LAYERS}.quantization.fp8", "import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        host_code.import_module("quantization.fp8")


def test_the_packages_that_vllm_imports_and_the_code_does_not_need_need_not_be_installed(release):
    write(release, f"{LAYERS}.quantization.fp8", "\n".join(f"import {each}" for each in NOT_NEEDED))
    assert host_code.import_module("quantization.fp8") is not None


def test_a_tested_module_imports_others_that_are_tested_as_they_are(release):
    write(release, f"{LAYERS}.fused_moe.oracle.fp8", "from vllm.scalar_type import ANSWER\n")
    write(release, "vllm.scalar_type", "ANSWER = 42\n")
    write(release, "vllm.config", "raise ImportError('this is not tested')\n")
    assert host_code.import_module("fused_moe.oracle.fp8").ANSWER == 42


# The GPU operator that is emulated.


def fp8_values():
    """Every value that is not negative, the smallest first: the one with the code n stands at n."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).double()


def nearest(value: float) -> float:
    """The e4m3 value nearest to `value`, the one with the even code of two that are as near; saturating."""
    distances = (fp8_values() - min(abs(value), 448.0)).abs()
    best = (distances == distances.min()).nonzero().flatten().tolist()
    code = next((code for code in best if code % 2 == 0), best[0])
    return float(fp8_values()[code]) * (-1.0 if value < 0 else 1.0)


def rounded(weights: torch.Tensor, scales: list[float]) -> list[list[float]]:
    """Divide each row by its scale, as float32, and round."""
    rows = zip(weights.float().numpy(), numpy.float32(scales))
    return [[nearest(float(value / scale)) for value in row] for row, scale in rows]


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def weights(request):
    """Rows of different magnitudes, with a row of zeros and one of the largest values."""
    values = torch.randn((6, 40), generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6)[:, None]
    values[2] = 0.0
    return values.to(request.param)


def test_quantisation_by_a_given_scale(weights):
    scale = torch.tensor([0.25])
    bits, returned = host_code.scaled_fp8_quant(weights, scale)
    assert bits.dtype == torch.float8_e4m3fn
    assert returned is scale
    assert bits.float().tolist() == rounded(weights, [0.25] * 6)
    assert bits.float().abs().max() == 448.0


def test_quantisation_by_the_largest_magnitude(weights):
    bits, scale = host_code.scaled_fp8_quant(weights)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1,))
    assert float(scale) == pytest.approx(float(weights.abs().max()) / 448.0, rel=1e-6)
    assert bits.float().tolist() == rounded(weights, [float(scale)] * 6)


def test_quantisation_by_the_largest_magnitude_of_each_row(weights):
    bits, scale = host_code.scaled_fp8_quant(weights, use_per_token_if_dynamic=True)
    assert tuple(scale.shape) == (6, 1)
    assert scale.flatten().tolist() == pytest.approx(
        [max(float(row.abs().max()) / 448.0, 1.0 / (448.0 * 512.0)) for row in weights], rel=1e-6
    )
    assert bits.float().tolist() == rounded(weights, scale.flatten().tolist())
    assert not bits[2].float().any()


@pytest.mark.parametrize(
    "option",
    [
        {"num_token_padding": 8},
        {"scale_ub": torch.ones(1)},
        {"output": torch.zeros((1, 1), dtype=torch.float8_e4m3fn)},
        {"group_shape": (1, 128)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_emulated_says_so(option):
    with pytest.raises(NotImplementedError, match="without padding, upper bounds, outputs and groups"):
        host_code.scaled_fp8_quant(torch.ones((1, 1)), **option)


# What is made of results.


def test_a_result_is_copied_into_the_output():
    output = torch.zeros(2, 3)
    deliver("w13", torch.ones(2, 3), output)
    assert output.tolist() == [[1.0] * 3] * 2


def test_float8_is_put_into_an_output_of_bytes():
    output = torch.zeros(2, dtype=torch.uint8)
    deliver("w13", torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn), output)
    assert output.tolist() == [0x38, 0xFE]


def test_a_result_that_lies_in_the_output_already_stays():
    output = torch.arange(4.0)
    deliver("permuted", output.view(4), output)
    assert output.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("result", "form"),
    [
        (None, "NoneType"),
        ((1, 2), "tuple"),
        (torch.zeros(2, 3), "float32 [2, 3] on cpu"),
        (torch.zeros(6), "float32 [6] on cpu"),
        (torch.zeros((3, 2), dtype=torch.float64), "float64 [3, 2] on cpu"),
        (torch.zeros(2, 3).T, "non-contiguous float32 [3, 2] on cpu"),
        (torch.zeros(3, 2, device="meta"), "float32 [3, 2] on meta"),
    ],
)
def test_a_result_of_another_form_is_wrong(result, form):
    with pytest.raises(WrongResultError) as error:
        deliver("w2", result, torch.zeros(3, 2))
    assert (error.value.output, error.value.clause) == ("w2", "form_of_result")
    assert str(error.value) == f"w2 is {form} and must be float32 [3, 2] on cpu"


def test_float8_that_is_not_contiguous_is_wrong_for_an_output_of_bytes():
    with pytest.raises(WrongResultError, match=r"^w13 is non-contiguous float8_e4m3fn \[3, 2\] on cpu and must be "):
        deliver("w13", torch.zeros(2, 3).to(torch.float8_e4m3fn).T, torch.zeros((3, 2), dtype=torch.uint8))
