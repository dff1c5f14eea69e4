"""What a step costs and how fast it went: operations per token, the peak of known GPUs, a windowed meter.

Plain arithmetic on numbers the loop already has on the host; nothing here touches a device.
"""

import re
from collections import deque

# Dense bf16 FLOP/s of one GPU with fp32 accumulation, by the words that must all stand in its name; the longest match
# wins. NVIDIA prints most of these with 2:4 sparsity, so these are half of the sheet's. From the data sheets of A100,
# A10, A30, A40, L4, L40, L40S, RTX A6000, H20, H100, H800, H200, GH200, HGX B100/B200/B300 (28 and 36 PFLOP/s for 8),
# GB200 and GB300 NVL72 (360 for 72), AMD MI300X and MI325X; for RTX cards the white papers of Ampere GA102, Ada and
# Blackwell, row "FP16 Tensor with FP32 accumulate", on GeForce half of the advertised one. A10G: AWS G5, half of 140.
PEAK_FLOPS: dict[str, float] = {
    "A10": 125e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "A800": 312e12,
    "B100": 1750e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "GH200": 989.4e12,
    "H100": 989.4e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H800": 989.4e12,
    "H800 PCIe": 756e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
    "RTX 3090": 71e12,
    "RTX 3090 Ti": 80e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "RTX 6000 Ada": 364.2e12,
}

# A slice of a GPU, a mobile part or a cut-down one has the big one's name in its own but not its speed.
NOT_THE_WHOLE_GPU = frozenset({"MIG", "LAPTOP", "MAX", "D", "GRID"})


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that torch.cuda.get_device_name() calls so; None when unknown, a slice, or a CPU."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & NOT_THE_WHOLE_GPU:
        return None
    matches = [name for name in PEAK_FLOPS if words.issuperset(name.upper().split())]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def flops_per_token(
    *,
    num_matmul_parameters: int,
    num_trainable_matmul_parameters: int,
    num_layers: int,
    hidden_size: int,
    mean_context: float,
) -> float:
    """Floating-point operations that one trained token needs, forward and backward.

        forward   2 N + 4 L D C
        backward  2 N + 8 L D C    gradients of the activations, through frozen weights too
                + 2 N_trainable    gradients of the weights, only where weights are trained

    Recomputation under gradient checkpointing does not count: it is a choice, not a need. With only the last blocks
    trained the result is an upper bound, as the backward pass ends early.

    Args:
        num_matmul_parameters: N, weights a token is multiplied with: linear layers and the output head, adapters too;
            not embeddings that are looked up. A tied embedding counts once, as the head.
        num_trainable_matmul_parameters: N_trainable, those of them that are trained.
        num_layers: L, attention layers.
        hidden_size: D of the attention: query heads x head size.
        mean_context: C, keys that a token attends to on average; (T + 1) / 2 for one causal sequence of T tokens.
    Source: Chowdhery et al., 2022 (PaLM), appendix B, arXiv:2204.02311: 6 N + 12 L D T, there without the causal mask
        (C = T) and with every weight trained.
    """
    attention = 12 * num_layers * hidden_size * mean_context
    return 4 * num_matmul_parameters + 2 * num_trainable_matmul_parameters + attention


class Throughput:
    """Tokens per second over the last steps. Time that is not added (evaluation, saving) does not count.

    Args:
        world_size: number of ranks; tokens are those of all of them.
        flops_per_token: see flops_per_token(); None when the model's cost is unknown.
        peak_flops_per_gpu: see peak_flops(); None on an unknown GPU.
        window: steps that are averaged.
    """

    def __init__(
        self,
        *,
        world_size: int = 1,
        flops_per_token: float | None = None,
        peak_flops_per_gpu: float | None = None,
        window: int = 20,
    ) -> None:
        self.world_size = world_size
        self.flops_per_token = flops_per_token
        self.peak_flops_per_gpu = peak_flops_per_gpu
        self._steps: deque[tuple[float, int, int, float]] = deque(maxlen=window)
        self._total_seconds = 0.0
        self._total_tokens = 0

    def add(self, step_seconds: float, tokens: int, target_tokens: int, *, data_seconds: float) -> None:
        """One optimizer step: its wall time, the tokens of all ranks, those of them that are learned, and how much of
        the time this rank waited for data.
        """
        self._steps.append((step_seconds, tokens, target_tokens, data_seconds))
        self._total_seconds += step_seconds
        self._total_tokens += tokens

    @property
    def tokens_per_second(self) -> float | None:
        """All ranks, over the window; None before the first step."""
        return self._rate(1)

    @property
    def target_tokens_per_second(self) -> float | None:
        """Learned tokens of all ranks, over the window; None before the first step."""
        return self._rate(2)

    @property
    def data_fraction(self) -> float | None:
        """Share of the time, 0 to 1, that this rank waited for data, over the window; None before the first step."""
        return self._rate(3)

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        rate = self.tokens_per_second
        return None if rate is None else rate / self.world_size

    @property
    def mfu(self) -> float | None:
        """Share of the GPUs' dense bf16 peak, 0 to 1, over the window; None when the peak or the cost is unknown."""
        return self._mfu(self.tokens_per_second)

    @property
    def run_tokens_per_second(self) -> float | None:
        """All ranks, over every step added so far: the figure of a whole run."""
        return self._total_tokens / self._total_seconds if self._total_seconds > 0 else None

    @property
    def run_mfu(self) -> float | None:
        """mfu over every step added so far."""
        return self._mfu(self.run_tokens_per_second)

    def metrics(self) -> dict[str, float | None]:
        """The window's figures under their metric names; mfu is left out where it is unknown."""
        named = {
            "throughput/tokens_per_second": self.tokens_per_second,
            "throughput/tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "throughput/target_tokens_per_second": self.target_tokens_per_second,
            "throughput/data_fraction": self.data_fraction,
        }
        return named if self.mfu is None else named | {"throughput/mfu": self.mfu}

    def _rate(self, column: int) -> float | None:
        seconds = sum(step[0] for step in self._steps)
        return sum(step[column] for step in self._steps) / seconds if seconds > 0 else None

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self.flops_per_token is None or self.peak_flops_per_gpu is None:
            return None
        return tokens_per_second * self.flops_per_token / (self.peak_flops_per_gpu * self.world_size)
