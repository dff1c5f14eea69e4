"""A trace written by hand, in torch.profiler's own form: one step of 100 microseconds."""

from typing import Any

PHASES = {"reading data": (0, 10), "forward": (10, 40), "backward": (40, 70), "update": (70, 100)}
MAIN, OTHER = 1, 2  # threads


def event(cat: str, name: str, start: float, end: float, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


def op(
    name: str, start: float, end: float, tid: int = MAIN, dims: Any = (), values: Any = (), sequence: int | None = None
) -> dict[str, Any]:
    shaped = {"Input Dims": list(dims), "Input type": ["float"] * len(dims), "Concrete Inputs": list(values)}
    shaped |= {} if sequence is None else {"Sequence number": sequence}
    return event("cpu_op", name, start, end, tid, **shaped)


def memory(moment: float, num_bytes: int, address: int, total: int = 0, device: int = 0) -> dict[str, Any]:
    args = {"Bytes": num_bytes, "Addr": address, "Total Allocated": total, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": moment, "tid": MAIN, "args": args}


def step(at: float = 0.0) -> list[dict[str, Any]]:
    phases = [event("user_annotation", f"tunesmith: {name}", at + a, at + b) for name, (a, b) in PHASES.items()]
    return [event("user_annotation", f"tunesmith step {at:g}", at, at + 100), *phases]


CPU = [
    *step(),
    op("aten::empty", 2, 8),  # a batch
    op("LoraLinear", 10, 35),
    op("aten::mm", 10, 30, dims=[[4, 8], [8, 2]]),
    op("autograd::engine::evaluate_function: MulBackward0", 40, 69),
    op("aten::mul", 40, 68, dims=[[10], [10]]),
    op("aten::item", 42, 44),
    op("aten::_local_scalar_dense", 42, 43),
    op("c10d::allreduce_", 70, 75),
    event("user_annotation", "gloo:all_reduce", 65, 85, OTHER),
    op("aten::_fused_adamw_", 90, 95),
    op("aten::mm", 200, 300),  # after the step
]


def launch(number: int, start: float, end: float) -> dict[str, Any]:
    return event("cuda_runtime", "cudaLaunchKernel", start, end, correlation=number)


def on_gpu(cat: str, name: str, start: float, end: float, number: int) -> dict[str, Any]:
    return event(cat, name, start, end, 7, correlation=number, stream=7)


# The GPU does what the host asked for later: the forward's second kernel runs while the host is in the backward.
GPU = [
    *step(),
    event("gpu_user_annotation", "tunesmith: forward", 12, 55, 7),
    op("aten::linear", 10, 20),
    op("aten::addmm", 11, 19, dims=[[2], [4, 8], [8, 2]], values=["", "", "", "1", "1"]),
    launch(1, 12, 13),
    on_gpu("kernel", "sm90_xmma_gemm_bf16", 14, 30, 1),
    launch(7, 14, 15),
    on_gpu("kernel", "splitKreduce_kernel", 32, 34, 7),  # of the same operation
    op("_LinearCrossEntropy", 30, 39),
    launch(2, 31, 32),
    on_gpu("kernel", "lce_row_kernel", 42, 50, 2),
    op("aten::mul", 41, 43, dims=[[10], [10]]),
    launch(3, 41.5, 42),
    on_gpu("kernel", "elementwise_kernel", 50, 60, 3),
    event("python_function", "tunesmith/train/engine.py(118): step", 61, 69),
    event("python_function", "torch/_tensor.py(7): item", 62, 69),
    op("aten::item", 62, 69),
    event("cuda_runtime", "cudaStreamSynchronize", 63, 68),
    launch(4, 45, 46),
    on_gpu("kernel", "ncclDevKernel_AllReduce", 55, 75, 4),
    launch(5, 72, 73),
    on_gpu("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 80, 84, 5),
    launch(6, 85, 86),
    on_gpu("kernel", "multi_tensor_apply_kernel", 90, 98, 6),
]
