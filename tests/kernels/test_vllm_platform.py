"""The platform that vLLM's host code is told it runs on, with a package `vllm_fake` for vLLM."""

import sys
import types

import pytest
import torch

from kernelfuzz.kernels.vllm.platform import EmulatedPlatform, TouchedCudaError, emulate_platform
from kernelfuzz.kernels.vllm.stand_in import StandIn, StandInLacksError
from kernelfuzz.strategies.devices import PLATFORMS
from kernelfuzz.strategies.errors import KernelfuzzError

PACKAGE = ("vllm_fake",)

CODE = """\
import torch
def ask():
    return current_platform
def touch():
    return torch.cuda.is_available()
def touch_and_go_on():
    try:
        return touch()
    except RuntimeError:
        return "went on"
def touch_something_else():
    return torch.cuda.device_count()
def move(tensor):
    return tensor.cuda()
def seed():
    return torch.manual_seed(7)
def import_from():
    from torch.cuda import is_available
    return is_available()
"""


def module_of(name: str, code: str, **names: object) -> types.ModuleType:
    """A module whose functions know that they are its own."""
    module = types.ModuleType(name)
    vars(module).update(names)
    exec(code, vars(module))
    return module


@pytest.fixture
def fake(monkeypatch) -> types.ModuleType:
    """A module of the package under test, which believes in a platform "real"."""
    module = module_of("vllm_fake.ops", CODE, current_platform="real")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def cuda_as_seen() -> tuple[object, ...]:
    """Everything that is closed meanwhile."""
    return torch.cuda, sys.modules["torch.cuda"], torch.Tensor.cuda


@pytest.fixture(autouse=True)
def _everything_is_as_before():
    before = cuda_as_seen()
    yield
    assert all(now is then for now, then in zip(cuda_as_seen(), before))


# What the platform answers.


@pytest.mark.parametrize(
    ("kind", "yes", "device_type"),
    [
        ("cpu", {"is_cpu"}, "cpu"),
        ("cuda", {"is_cuda", "is_cuda_alike"}, "cuda"),
        ("rocm", {"is_rocm", "is_cuda_alike"}, "cuda"),
        ("xpu", {"is_xpu"}, "xpu"),
    ],
)
def test_each_kind_answers_for_itself(kind, yes, device_type):
    platform = EmulatedPlatform(kind)
    questions = ("is_cpu", "is_cuda", "is_rocm", "is_cuda_alike", "is_xpu", "is_tpu", "is_out_of_tree")
    assert {name for name in questions if getattr(platform, name)()} == yes
    assert (platform.device_name, platform.device_type) == (kind, device_type)
    assert platform.fp8_dtype() == torch.float8_e4m3fn
    assert (platform.supports_fp8(), platform.is_fp8_fnuz()) == (True, False)


def test_every_kind_is_known_and_no_other():
    assert {EmulatedPlatform(kind).device_name for kind in PLATFORMS} == {"cpu", "cuda", "rocm", "xpu"}
    for make in (EmulatedPlatform, lambda kind: emulate_platform(kind).__enter__()):
        with pytest.raises(KernelfuzzError) as error:
            make("tpu")
        assert str(error.value) == "unknown platform 'tpu': expected one of cpu, cuda, rocm, xpu"


@pytest.mark.parametrize("kind", PLATFORMS)
def test_only_cuda_has_a_capability_and_it_is_hoppers(kind):
    platform = EmulatedPlatform(kind)
    is_cuda = kind == "cuda"
    for capability, at_least, exactly in (
        (80, True, False),
        ((9, 0), True, True),
        (90, True, True),
        (100, False, False),
    ):
        assert platform.has_device_capability(capability) == (is_cuda and at_least)
        assert platform.is_device_capability(capability) == (is_cuda and exactly)
    assert platform.is_device_capability_family(90) == is_cuda
    assert not platform.is_device_capability_family(100)
    found = platform.get_device_capability()
    assert found == ((9, 0) if is_cuda else None)


def test_another_capability_can_be_told():
    platform = EmulatedPlatform("cuda", (12, 1))
    assert platform.is_device_capability((12, 1))
    assert platform.has_device_capability(120)
    assert not platform.is_device_capability(120)
    assert platform.is_device_capability_family(120)
    assert platform.get_device_capability().to_int() == 121
    assert platform.get_device_capability().as_version_str() == "12.1"


def test_a_question_that_is_not_foreseen_is_the_stand_ins_fault_and_may_be_asked_for():
    platform = EmulatedPlatform("xpu")
    with pytest.raises(StandInLacksError) as error:
        platform.get_cpu_architecture()
    assert str(error.value).startswith("kernelfuzz has no stand-in for current_platform.get_cpu_architecture, which")
    assert isinstance(error.value, KernelfuzzError)
    assert not hasattr(platform, "get_cpu_architecture")


def test_a_stand_in_says_what_it_lacks():
    config = StandIn("FusedMoEConfig", tp_size=1)
    assert config.tp_size == 1
    assert not hasattr(config, "dp_size")
    with pytest.raises(StandInLacksError, match="no stand-in for dp_size of FusedMoEConfig, which"):
        _ = config.dp_size


def test_compute_units_are_asked_for_by_an_index_or_none():
    platform = EmulatedPlatform("xpu")
    assert [platform.num_compute_units(), platform.num_compute_units(None), platform.num_compute_units(1)] == [132] * 3
    platform.compute_units = 8
    assert platform.num_compute_units(0) == 8
    for device in (torch.device("cpu"), torch.device("cuda", 0), "xpu:0"):
        with pytest.raises(TypeError, match="takes an integer device index or None, got"):
            platform.num_compute_units(device)


# Who sees it.


@pytest.mark.parametrize("kind", PLATFORMS)
def test_code_under_test_sees_the_platform_and_gets_its_own_back(kind, fake):
    with emulate_platform(kind, PACKAGE) as emulated:
        assert fake.ask() is emulated
        assert emulated.device_name == kind
    assert fake.ask() == "real"


def test_a_platform_that_is_given_is_the_one_that_is_seen(fake):
    platform = EmulatedPlatform("xpu")
    with emulate_platform(platform, PACKAGE) as emulated:
        assert emulated is platform is fake.ask()


def test_each_module_gets_back_its_own_and_other_packages_see_nothing(fake, monkeypatch):
    names = ("vllm_fake", "vllm_fake.lora.ops", "vllm_fake_too.ops", "other.vllm_fake")
    modules = {name: module_of(name, CODE, current_platform=f"of {name}") for name in names}
    modules["vllm_fake.none"] = module_of("vllm_fake.none", "asked = []")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with emulate_platform("xpu", PACKAGE) as emulated:
        assert [modules[name].ask() is emulated for name in names] == [True, True, False, False]
        assert "current_platform" not in vars(modules["vllm_fake.none"])
    assert [modules[name].ask() for name in names] == [f"of {name}" for name in names]
    assert "current_platform" not in vars(modules["vllm_fake.none"])


def test_everything_is_as_before_after_an_exception(fake):
    before = cuda_as_seen()
    for kind in PLATFORMS:
        with pytest.raises(ZeroDivisionError), emulate_platform(kind, PACKAGE):
            raise ZeroDivisionError
        assert fake.ask() == "real"
        assert all(now is then for now, then in zip(cuda_as_seen(), before))


# What is closed.


@pytest.mark.parametrize("kind", ["cpu", "xpu"])
@pytest.mark.parametrize(
    ("function", "arguments", "line", "what"),
    [
        ("touch", (), 5, "torch.cuda.is_available"),
        ("touch_something_else", (), 12, "torch.cuda.device_count"),
        ("move", (torch.zeros(1),), 14, "Tensor.cuda"),
    ],
)
def test_torch_cuda_is_closed_to_code_under_test(kind, function, arguments, line, what, fake):
    with pytest.raises(TouchedCudaError) as error, emulate_platform(kind, PACKAGE):
        getattr(fake, function)(*arguments)
    assert str(error.value) == f"vllm_fake.ops.{function}, line {line}, uses {what}"
    assert fake.ask() == "real"


def test_a_name_imported_from_torch_cuda_is_closed_too(fake):
    with pytest.raises(TouchedCudaError, match=r"vllm_fake\.ops\.import_from"), emulate_platform("xpu", PACKAGE):
        fake.import_from()


def test_a_touch_that_is_swallowed_is_raised_at_the_end(fake):
    reached = []

    def two_touches():
        reached.append(fake.touch_and_go_on())
        with pytest.raises(TouchedCudaError, match="touch_something_else"):
            fake.touch_something_else()
        reached.append("the end")

    with pytest.raises(TouchedCudaError) as error, emulate_platform("xpu", PACKAGE):
        two_touches()
    assert reached == ["went on", "the end"]
    assert str(error.value) == "vllm_fake.ops.touch, line 5, uses torch.cuda.is_available", "the first of them"
    assert fake.ask() == "real"


def test_an_exception_is_not_hidden_by_a_touch_that_was_swallowed(fake):
    def touch_and_fail():
        return 1 // (fake.touch_and_go_on() != "went on")

    with pytest.raises(ZeroDivisionError), emulate_platform("xpu", PACKAGE):
        touch_and_fail()


def test_touches_are_forgotten_by_the_next_time(fake):
    for _ in range(2):
        with pytest.raises(TouchedCudaError), emulate_platform("xpu", PACKAGE):
            fake.touch_and_go_on()
    with emulate_platform("xpu", PACKAGE):
        pass


@pytest.mark.parametrize("kind", ["cpu", "xpu"])
def test_torch_and_everybody_else_use_torch_cuda_as_ever(kind, fake):
    real, asked = torch.cuda, []
    with emulate_platform(kind, PACKAGE):
        assert torch.cuda is not real
        assert torch.cuda.is_available() == real.is_available()
        torch.cuda.put_there_by_a_test = True
        fake.seed()  # torch seeds every device
        asked.append(torch.initial_seed())
    assert asked == [7]
    assert real.put_there_by_a_test
    del real.put_there_by_a_test


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_torch_cuda_stays_open_on_nvidias_and_amds_gpus(kind, fake):
    real = torch.cuda
    with emulate_platform(kind, PACKAGE):
        assert torch.cuda is real
        assert fake.touch() == real.is_available()
        assert fake.import_from() == real.is_available()
        assert fake.touch_something_else() == real.device_count()


def test_who_imports_the_platform_late_sees_it_too(monkeypatch):
    platforms = types.ModuleType("vllm_fake.platforms")  # gives its attribute when it is asked for, as vLLM's does
    monkeypatch.setitem(sys.modules, "vllm_fake", types.ModuleType("vllm_fake"))
    monkeypatch.setitem(sys.modules, platforms.__name__, platforms)
    with emulate_platform("xpu", PACKAGE) as platform:
        from vllm_fake.platforms import current_platform

        assert current_platform is platform
    assert not hasattr(platforms, "current_platform")


def test_torch_cuda_under_another_name_is_closed_too(fake):
    fake.gpu = torch.cuda
    exec("def ask_it(): return gpu.is_available()", vars(fake))
    with pytest.raises(TouchedCudaError, match=r"uses torch\.cuda\.is_available"), emulate_platform("cpu", PACKAGE):
        fake.ask_it()
    assert fake.gpu is torch.cuda


def test_a_write_is_a_touch(fake):
    exec("def write(): torch.cuda.seen_by_nobody = 1", vars(fake))
    with pytest.raises(TouchedCudaError, match=r"uses torch\.cuda\.seen_by_nobody"), emulate_platform("cpu", PACKAGE):
        fake.write()
    assert not hasattr(torch.cuda, "seen_by_nobody")


def test_a_test_may_patch_torch_cuda_meanwhile(fake, monkeypatch):
    before = torch.cuda.is_available
    with emulate_platform("cpu", PACKAGE):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: "patched")
            patch.setattr(torch.cuda, "seen_by_nobody", 1, raising=False)
            assert torch.cuda.is_available() == "patched"
        assert torch.cuda.is_available() is before()
    assert torch.cuda.is_available is before
    assert not hasattr(torch.cuda, "seen_by_nobody")


def test_platforms_may_be_nested(fake):
    before, real = torch.cuda, torch.cuda.is_available()
    with emulate_platform("xpu", PACKAGE):
        with emulate_platform("cuda", PACKAGE) as inner:
            assert fake.ask() is inner
            assert fake.touch() is real
        assert fake.ask().is_xpu()
        assert torch.cuda is not before
    assert torch.cuda is before


def test_what_is_kept_for_longer_is_open_again(fake):
    exec("def keep():\n    from torch import cuda\n    return cuda", vars(fake))
    exec("def ask_it(): return kept.is_available()", vars(fake))
    with emulate_platform("xpu", PACKAGE):
        fake.kept = fake.keep()
    assert fake.ask_it() is torch.cuda.is_available()
    with emulate_platform("rocm", PACKAGE):
        assert fake.ask_it() is torch.cuda.is_available()
    with pytest.raises(TouchedCudaError), emulate_platform("xpu", PACKAGE):
        fake.ask_it()


def test_one_package_may_be_named_by_itself(fake):
    with pytest.raises(TouchedCudaError), emulate_platform("xpu", "vllm_fake"):
        fake.touch()
