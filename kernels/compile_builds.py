"""Every way in which the Triton kernels are shipped, for the cross-compiler (compile_report.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunesmith.kernels import leaf_calls
from tunesmith.kernels.blocks import Block, block
from tunesmith.kernels.dry_launches import Launch, dry_launches
from tunesmith.kernels.lce import anchored, anchored_kernels, chunked
from tunesmith.kernels.lora import block_tables, triton_kernels


@dataclass(frozen=True)
class Build:
    """One shipped way to compile a kernel: all that the cross-compiler needs, without a GPU."""

    kernel: Any  # the @triton.jit function
    block: Block
    arch: int  # 80 or 90
    signature: dict[str, str]  # argument -> Triton type: "*bf16", "fp32", "i32", ... ; constexpr ones left out
    constants: dict[str, Any]  # constexpr argument -> value, without the block's sizes
    label: str  # what a reader of the report should see: the features that are on
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16; pointers always are
    expects: tuple[str, ...] = ()  # instructions that must be in the machine code, such as HGMMA


ARCHS = 80, 90
LCE_TYPES = {"x": "*bf16", "w": "*bf16", "slab": "*bf16", "e": "*bf16", "grad": "*bf16", "bias": "*fp32"}
LCE_TYPES |= dict.fromkeys(("partial", "products", "sums", "out"), "*fp32") | {"own_C": "*i64", "stride": "i64"}
LCE_TYPES |= {f"{name}_C": "*fp32" for name in ("label", "offset", "coefficient", "e_factor", "label_factor")}
LCE_TYPES |= dict.fromkeys(("C", "V", "D", "e_stride"), "i32") | {"scale": "fp32", "cap": "fp32"}
ALL_OPTIONS = {"HAS_BIAS": True, "HAS_CAP": True, "STORE": True, "GRAD": True, "STATS": True}


def _lce_build(kernel: Any, sizes: Block, arch: int, options: dict[str, Any], label: str, **more: Any) -> Build:
    types = {name: kind for name, kind in LCE_TYPES.items() if name in kernel.arg_names}
    return Build(kernel, sizes, arch, types, options, label, **more)


def chunked_builds() -> list[Build]:
    """The row kernel with every block. With most vocabularies Triton finds V divisible by 16 at a launch, and loads in
    vectors; with GPT-2's 50,257 it does not.
    """
    plain = {"HAS_BIAS": False, "HAS_CAP": False, "STATS": False, "GRAD": True}
    found = []
    for arch in ARCHS:
        for i, sizes in enumerate(chunked.ROW_BLOCKS[arch]):
            for label, options in (("plain", plain), ("all options", ALL_OPTIONS)):
                for name, aligned in ((label, ("stride", "V")), (f"{label}, odd V", ("stride",)))[: 2 if i == 0 else 1]:
                    found.append(_lce_build(chunked.lce_rows_kernel, sizes, arch, options, name, aligned=aligned))
    return found


PRODUCT_OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"HAS_BIAS": False, "HAS_CAP": False, "STORE": True, "STATS": False},
    "train, bias": {"HAS_BIAS": True, "HAS_CAP": False, "STORE": True, "STATS": False},
    "train, cap": {"HAS_BIAS": False, "HAS_CAP": True, "STORE": True, "STATS": False},
    "evaluate": {"HAS_BIAS": False, "HAS_CAP": False, "STORE": False, "STATS": True},
    "train, all options": {"HAS_BIAS": True, "HAS_CAP": True, "STORE": True, "STATS": True},
}
EVEN = "D", "V", "e_stride"  # divisible by 16 at most launches, and then compiled for it


def anchored_builds() -> list[Build]:
    """The product with every block, and the kernels that go by rows, which have one configuration each."""
    found = []
    for arch in ARCHS:
        kernel, matrix, extra = (
            (anchored_kernels.lce_gemm_tma_kernel, ("HGMMA", "UTMALDG"), {"PROGRAMS": 132, "SPECIALIZE": False})
            if arch == 90
            else (anchored_kernels.lce_gemm_kernel, ("HMMA", "LDGSTS"), {})
        )
        for label, options in PRODUCT_OPTIONS.items():
            constants = options | {"WIDEN": False} | extra
            for sizes in anchored.product_blocks(options["STATS"], options["HAS_CAP"])[1][arch]:
                found.append(_lce_build(kernel, sizes, arch, constants, label, aligned=EVEN, expects=matrix))
        rescue = block(4, 2, BLOCK_V=anchored.RESCUE_BLOCK_V, BLOCK_D=anchored.RESCUE_BLOCK_D)
        for kernel, sizes in (
            (anchored_kernels.lce_anchor_kernel, block(4, 2, BLOCK_D=anchored.ROW_BLOCK_D)),
            (anchored_kernels.lce_rescue_kernel, rescue),
            (anchored_kernels.lce_terms_kernel, block(2, 2, BLOCK_C=anchored.ROWS_A_PROGRAM)),
            (anchored_kernels.lce_hidden_kernel, block(4, 2, BLOCK_D=anchored.ROW_BLOCK_D)),
        ):
            found.append(_lce_build(kernel, sizes, arch, ALL_OPTIONS, "all options", aligned=EVEN))
    return found


LORA_FLAGS: dict[str, list[dict[str, bool]]] = {
    "down": [{"DROP": False}, {"DROP": True}],
    "up": [{"BIAS": False}, {"BIAS": True}],
    "grad_up": [{"DU": True, "DB": True}, {"DU": True, "DB": False}, {"DU": False, "DB": True}],
    "grad_down": [
        {"DROP": False, "DA": True, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": False, "ADD": False},
        {"DROP": True, "DA": False, "DX": True, "ADD": False},
        {"DROP": True, "DA": True, "DX": True, "ADD": True},
    ],
}


def lora_builds() -> list[Build]:
    """Every block with every feature; the rarer features (not the first two) with the default block only."""
    found = []
    for arch, table in ((90, block_tables.HOPPER), (80, block_tables.OTHER)):
        for kernel, all_flags in LORA_FLAGS.items():
            for ranks in block_tables.BUCKETS:
                for i, sizes in enumerate(table[kernel][ranks]):
                    for flags in all_flags if i == 0 else all_flags[:2]:
                        found.append(_lora_build(kernel, sizes, arch, "*bf16", ranks, flags))
            widest = block_tables.MOST_FLOAT32_RANKS
            found.append(_lora_build(kernel, block_tables.FLOAT32[kernel], arch, "*fp32", widest, all_flags[-1]))
        found += [_sum_build(arch), _drop_build(arch)]
    return found


def _lora_build(kernel: str, sizes: Block, arch: int, element: str, ranks: int, flags: dict[str, bool]) -> Build:
    function = getattr(triton_kernels, kernel)
    constants: dict[str, Any] = {**flags, "WIDEN": False, "BLOCK_R": ranks}
    signature = {}
    for name in function.arg_names:
        if name in constants or name.startswith("BLOCK"):
            continue
        if name.endswith(("_NK", "_RK", "_NR", "_OR", "_NO", "_O")):
            signature[name] = element
        else:
            signature[name] = "*fp32" if name.endswith("_parts") else "fp32" if name == "scale" else "i32"
    on = " ".join(name for name, value in flags.items() if value)
    aligned = ("N", "K", "OUT", "R", "first_rank", "chunk", *(["rank_B"] if ranks > 16 else []))  # r = 8 is not
    label = f"{element[1:]} R={ranks} {on}".strip()
    return Build(function, sizes, arch, signature, constants, label, tuple(n for n in aligned if n in signature))


def _sum_build(arch: int) -> Build:
    numbers = "part_size", "width", "rows", "columns", "out_stride"
    signature = {"parts": "*fp32", "out": "*bf16", **dict.fromkeys(("num_parts", *numbers), "i32"), "scale": "fp32"}
    sizes = block(4, 2, BLOCK=block_tables.SUM_BLOCK)
    return Build(triton_kernels.ordered_sum, sizes, arch, signature, {}, "bf16", numbers)


def _drop_build(arch: int) -> Build:
    integers = dict.fromkeys(("N", "K", "threshold", "seed_low", "seed_high"), "i32")
    signature = {"x_NK": "*bf16", "out_NK": "*bf16", "scale": "fp32", **integers}
    return Build(triton_kernels.drop, block_tables.DROP_BLOCK, arch, signature, {}, "bf16", ("N", "K"))


def leaf_builds(calls: Callable[[], list[leaf_calls.Call]]) -> list[Build]:
    """What calls on meta tensors launch."""
    found: dict[tuple[int, str], Build] = {}
    for arch in ARCHS:
        with dry_launches(arch) as launches:
            for call in calls():
                call()
        found |= {(arch, launch.key): _launched(launch) for launch in launches}
    return list(found.values())


def _launched(launch: Launch) -> Build:
    names = launch.kernel.arg_names
    constants = {names[index]: value for (index,), value in launch.constants.items()}
    sizes = {name: constants.pop(name) for name in list(constants) if name.startswith("BLOCK")}
    signature = {name: kind for name, kind in launch.signature.items() if kind != "constexpr" and name not in constants}
    even = {names[index] for (index,), divisible in launch.attributes.items() if divisible}
    aligned = tuple(name for name, kind in signature.items() if name in even and not kind.startswith("*"))
    uneven = [name for name in ("D", "F", "half_K") if name in signature and name not in aligned]
    pointers = [kind[1:] for kind in signature.values() if kind.startswith("*")]
    label = " ".join(
        [pointers[0], *(f"{name}={value}" for name, value in constants.items()), *map("odd {}".format, uneven)]
    )
    blocks = block(launch.num_warps, launch.num_stages, **sizes)
    return Build(launch.kernel, blocks, launch.arch, signature, constants, label, aligned)


BUILDS: dict[str, Callable[[], list[Build]]] = {  # by what ships them
    "chunked": chunked_builds,
    "anchored": anchored_builds,
    "lora": lora_builds,
    **{name: partial(leaf_builds, calls) for name, calls in leaf_calls.CALLS.items()},
}
