"""What kernel launches would compile, without a GPU: an operation is called on meta tensors, which have shapes, strides
and offsets but no memory, as if they were on a GPU of some architecture.

Triton itself binds the arguments of each launch, and asks its cache hook before it compiles: there the launch is noted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tunesmith.kernels import device

ARCHS = {80: device.GPU(80, 108), 90: device.GPU(90, 132)}  # A100, H100 and H200


@dataclass(frozen=True)
class Launch:
    """One launch, as Triton would compile for it."""

    kernel: Any  # the @triton.jit function
    arch: int
    key: str  # of Triton's cache: another one is another compilation
    signature: dict[str, str]  # argument -> Triton type: "*bf16", "fp32", "i32", ..., "constexpr"
    constants: dict[tuple[int, ...], Any]  # by the argument's number: constexpr ones, and integers that are 1
    attributes: dict[tuple[int, ...], Any]  # by the argument's number: what is a multiple of 16
    num_warps: int
    num_stages: int


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> str:
        return f"dry {self._arch}"

    def get_current_stream(self, _: object) -> int:
        return 0


@contextmanager
def dry_launches(arch: int) -> Iterator[list[Launch]]:
    """Inside, kernels launched on meta tensors are noted in the list, and neither compiled nor run."""
    found: list[Launch] = []
    before = knobs.runtime.jit_cache_hook
    device.pretended = ARCHS[arch]
    driver.set_active(_Driver(arch))
    knobs.runtime.jit_cache_hook = _noting(found, arch)
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        driver.set_active(None)  # Triton looks for one of its own the next time
        device.pretended = None


def _noting(found: list[Launch], arch: int) -> Callable[..., bool]:
    def hook(*, key: str, fn: Any, **more: Any) -> bool:
        what = more["compile"]
        found.append(
            Launch(
                kernel=fn.jit_function,
                arch=arch,
                key=f"{fn.name} {key}",
                signature=what["signature"],
                constants=what["constants"],
                attributes=what["configs"][0],
                num_warps=what["num_warps"],
                num_stages=what["num_stages"],
            )
        )
        return True  # "compiled elsewhere": Triton does nothing more

    return hook
