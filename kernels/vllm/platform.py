"""The platform that a vLLM release's host code sees."""

import torch


class EmulatedPlatform:
    """Answers vLLM's `current_platform` questions for one device kind: "cuda", "rocm", "xpu" or "cpu".

    `compute_units` is what host code is told about the device's size. It may be asked for by an integer index or None;
    a `torch.device` is refused, as vLLM's own platforms cannot take one.
    """

    def __init__(self, kind: str) -> None:
        self.device_type = kind
        self.compute_units = 132

    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    def is_rocm(self) -> bool:
        return self.device_type == "rocm"

    def is_cuda_alike(self) -> bool:
        return self.is_cuda() or self.is_rocm()

    def is_xpu(self) -> bool:
        return self.device_type == "xpu"

    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def num_compute_units(self, device_id: int | None = 0) -> int:
        if device_id is not None and not isinstance(device_id, int):
            raise TypeError(f"num_compute_units takes an integer device index or None, got {device_id!r}")
        return self.compute_units

    def _capability(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def has_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and self._capability() >= _as_integer(capability)

    def is_device_capability(self, capability: int | tuple[int, int], device_id: int = 0) -> bool:
        del device_id
        return self.is_cuda() and self._capability() == _as_integer(capability)


def _as_integer(capability: int | tuple[int, int]) -> int:
    return capability if isinstance(capability, int) else 10 * capability[0] + capability[1]
