import pytest

from tunesmith.train.track.metrics import PEAK_FLOPS, Throughput, flops_per_token, peak_flops

# Dense bf16 TFLOP/s as the makers' data sheets give it (or half of it, where they give it with sparsity), beside the
# names that torch.cuda.get_device_name() returns.
DATA_SHEETS = [
    ("NVIDIA A100-SXM4-80GB", 624 / 2),
    ("NVIDIA A100 80GB PCIe", 624 / 2),
    ("NVIDIA H100 80GB HBM3", 1978.8 / 2),
    ("NVIDIA H100 PCIe", 1512 / 2),
    ("NVIDIA H100 NVL", 1671 / 2),
    ("NVIDIA H200", 1978.8 / 2),
    ("NVIDIA GH200 480GB", 1978.8 / 2),
    ("NVIDIA B200", 36_000 / 8 / 2),
    ("NVIDIA GB200", 360_000 / 72 / 2),
    ("NVIDIA L40S", 724 / 2),
    ("NVIDIA L4", 242 / 2),
    ("NVIDIA A10", 250 / 2),
    ("NVIDIA A10G", 140 / 2),
    ("NVIDIA GeForce RTX 4090", 330.4 / 2),
    ("NVIDIA GeForce RTX 3090", 142 / 2),
    ("NVIDIA RTX A6000", 309.6 / 2),
    ("NVIDIA RTX 6000 Ada Generation", 728.4 / 2),
]


@pytest.mark.parametrize(("device_name", "teraflops"), DATA_SHEETS)
def test_the_peak_is_the_data_sheets(device_name: str, teraflops: float) -> None:
    assert peak_flops(device_name) == pytest.approx(teraflops * 1e12, rel=0.005)


@pytest.mark.parametrize(
    "device_name",
    [
        "cpu",
        "",
        "Intel(R) Xeon(R) Platinum 8481C",
        "NVIDIA Z100",
        "Tesla V100-SXM2-32GB",  # has no bf16
        "Quadro RTX 6000",  # Turing, not Ada
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a seventh of one
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_an_unknown_gpu_has_no_peak_rather_than_a_guess(device_name: str) -> None:
    assert peak_flops(device_name) is None


def test_a_shorter_name_does_not_shadow_a_longer_one() -> None:
    assert peak_flops("NVIDIA H100 PCIe") != PEAK_FLOPS["H100"]
    assert peak_flops("NVIDIA A10G") != PEAK_FLOPS["A10"]


SEVEN_B = {"num_matmul_parameters": 6_607_000_000, "num_layers": 32, "hidden_size": 4096}


def test_full_training_costs_six_times_the_parameters_and_the_attention() -> None:
    flops = flops_per_token(**SEVEN_B, num_trainable_matmul_parameters=6_607_000_000, mean_context=2048)
    assert flops == pytest.approx(6 * 6.607e9 + 12 * 32 * 4096 * 2048)


def test_lora_costs_less_than_full_by_the_gradients_of_the_frozen_weights() -> None:
    full = flops_per_token(**SEVEN_B, num_trainable_matmul_parameters=6_607_000_000, mean_context=0)
    lora = flops_per_token(**SEVEN_B, num_trainable_matmul_parameters=20_000_000, mean_context=0)
    assert full - lora == pytest.approx(2 * (6_607_000_000 - 20_000_000))
    assert 0.66 < lora / full < 0.68


def test_longer_contexts_cost_more() -> None:
    costs = [
        flops_per_token(**SEVEN_B, num_trainable_matmul_parameters=0, mean_context=context)
        for context in (1, 1000, 2000)
    ]
    assert costs[2] - costs[1] == pytest.approx(12 * 32 * 4096 * 1000)


def test_throughput_counts_all_ranks_and_divides_by_them() -> None:
    meter = Throughput(world_size=4, flops_per_token=1e9, peak_flops_per_gpu=1e12)
    meter.add(2.0, tokens=1000, target_tokens=600, data_seconds=0.25)
    meter.add(3.0, tokens=1500, target_tokens=400, data_seconds=0.5)
    assert meter.tokens_per_second == pytest.approx(500)
    assert meter.tokens_per_second_per_gpu == pytest.approx(125)
    assert meter.target_tokens_per_second == pytest.approx(200)
    assert meter.metrics()["throughput/data_fraction"] == pytest.approx(0.15)
    assert meter.mfu == pytest.approx(125 * 1e9 / 1e12)
    assert meter.metrics()["throughput/mfu"] == meter.mfu


def test_the_window_forgets_slow_first_steps_and_the_run_does_not() -> None:
    meter = Throughput(flops_per_token=1e9, peak_flops_per_gpu=1e12, window=3)
    meter.add(97.0, tokens=100, target_tokens=100, data_seconds=0.0)  # compiling
    for _ in range(3):
        meter.add(1.0, tokens=100, target_tokens=100, data_seconds=0.0)
    assert meter.tokens_per_second == pytest.approx(100)
    assert meter.run_tokens_per_second == pytest.approx(4)
    assert meter.run_mfu == pytest.approx(4 * 1e9 / 1e12)


@pytest.mark.parametrize("known", [{"flops_per_token": 1e9}, {"peak_flops_per_gpu": 1e12}, {}])
def test_mfu_is_absent_when_cost_or_peak_is_unknown(known: dict[str, float]) -> None:
    meter = Throughput(**known)
    meter.add(1.0, tokens=10, target_tokens=10, data_seconds=0.0)
    assert meter.mfu is None
    assert "throughput/mfu" not in meter.metrics()


def test_no_step_is_no_rate() -> None:
    meter = Throughput()
    assert (meter.tokens_per_second, meter.mfu, meter.run_tokens_per_second) == (None, None, None)
