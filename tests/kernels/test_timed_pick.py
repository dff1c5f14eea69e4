"""The timed pick: right before fast, kept on disk, the same on every rank.

Real kernels are picked in the interpreter's process (conftest.py), whose table has one candidate each: the tests add
some. What must happen to slow and to wrong candidates is shown on an operation in plain torch that asks for its tile.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels import blocks, pick_cache, timed_pick
from tunesmith.kernels.blocks import block
from tunesmith.kernels.lce import backends
from tunesmith.kernels.pick_cache import cache_file
from tunesmith.kernels.timed_pick import Pick, Workload, forget_picks, pick, picks_as_json, use_picks

CPU = torch.device("cpu")
NUMBERS = 240_000
KEY = "toy", (NUMBERS,)


@pytest.fixture(autouse=True)
def _forget():
    yield
    forget_picks()


def toy(tiles: list[int], name: str = "toy", runs: list[str] | None = None, head: Any = None) -> Workload:
    """A sum by tiles: the smaller they are, the slower; it drops what is left over where a tile does not divide."""
    table = {0: [block(TILE=tile) for tile in tiles]}

    def prepare() -> timed_pick.TimedCall:
        numbers = torch.ones(NUMBERS)
        if runs is not None:
            runs.append(name)

        def run(backend: str) -> dict[str, torch.Tensor]:
            if backend == "torch":
                return {"sum": numbers.sum()}
            tile = blocks.choose("toy", table, CPU, (NUMBERS,))["TILE"]
            whole = NUMBERS // tile * tile  # divides by zero for a tile of 0
            return {"sum": sum(numbers[at : at + tile].sum() for at in range(0, whole, tile))}

        return run

    return Workload(name, prepare, ("triton",), torch.float32, head)


def chosen(pick: Pick) -> dict[Any, int]:
    return {key: tile["TILE"] for key, tile in pick.blocks}


def test_the_fastest_candidate_is_picked_and_then_used(tmp_path):
    found = pick([toy([100, 120_000, 1000])], CPU, tmp_path / "picks.json")
    assert chosen(found["toy"]) == {KEY: 120_000}
    assert blocks.picked == {}
    assert use_picks(picks_as_json(found, CPU), CPU)
    assert blocks.choose("toy", {0: [block(TILE=1)]}, CPU, (NUMBERS,)) == block(TILE=120_000)
    assert blocks.choose("toy", {0: [block(TILE=1)]}, CPU, (NUMBERS + 1,)) == block(TILE=1)


def test_a_slower_candidate_leaves_the_default(tmp_path):
    assert pick([toy([120_000, 100])], CPU, tmp_path / "picks.json")["toy"].blocks == []


def test_a_fast_candidate_that_is_wrong_or_fails_is_not_picked(tmp_path):
    with pytest.warns(UserWarning, match="left out on this GPU: toy") as said:
        found = pick([toy([10_000, 230_000, 0])], CPU, tmp_path / "picks.json")
    assert found["toy"].blocks == []
    wrong, failing = found["toy"].rejected
    assert "{'TILE': 230000, 'num_warps': 4, 'num_stages': 2}: sum is 4.2e-02 off what torch computes" in wrong
    assert "ZeroDivisionError" in failing
    assert len(said) == 2


@pytest.mark.filterwarnings("ignore:a kernel is left out")
def test_a_default_that_is_wrong_gives_way(tmp_path):
    assert chosen(pick([toy([230_000, 10_000])], CPU, tmp_path / "picks.json")["toy"]) == {KEY: 10_000}


@pytest.mark.filterwarnings("ignore:a kernel is left out")
def test_where_no_candidate_is_right_the_loss_falls_to_torch_and_lora_says_so(tmp_path):
    found = pick([toy([230_000], head=(7, 5))], CPU, tmp_path / "picks.json")
    assert found["toy"].backend == "torch"
    use_picks(picks_as_json(found, CPU), CPU)
    assert backends.preferred(CPU, torch.empty(7, 5)) == "torch"
    assert backends.preferred(CPU, torch.empty(7, 6)) == "chunked"
    with pytest.raises(RuntimeError, match=r"no kernel computes what torch does on this GPU: toy: .*4.2e-02 off"):
        pick([toy([230_000])], CPU, tmp_path / "others.json")


def test_a_second_pick_reads_the_file_and_times_only_what_is_new(tmp_path):
    runs: list[str] = []
    first = pick([toy([100, 1000], runs=runs)], CPU, tmp_path / "folder" / "picks.json")
    second = pick(
        [toy([100, 1000], name=name, runs=runs) for name in ("toy", "b")], CPU, tmp_path / "folder/picks.json"
    )
    assert runs == ["toy", "b"]
    assert second["toy"] == first["toy"]
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["picks.json"]


def test_another_driver_or_kernel_is_timed_anew(tmp_path, monkeypatch):
    cache, runs = tmp_path / "picks.json", []
    pick([toy([100, 1000], runs=runs)], CPU, cache)
    text = cache.read_text()
    cache.write_text(text.replace(torch.__version__, "2.0.0"))
    pick([toy([100, 1000], runs=runs)], CPU, cache)
    assert runs == ["toy", "toy"]
    assert len(json.loads(cache.read_text())["machines"]) == 2


def test_a_change_in_a_folder_of_kernels_is_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(pick_cache, "__file__", str(tmp_path / "pick_cache.py"))
    (tmp_path / "lce").mkdir()
    found = set()
    for text in ("BLOCK = 64", "BLOCK = 128"):
        (tmp_path / "lce/chunked.py").write_text(text)
        found.add(pick_cache.machine(CPU)["kernels"])
    assert len(found) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "machines": {"x": {"toy": {"blocks": 3}}}}', "\x00\xff"]
)
def test_a_broken_file_is_ignored_with_one_warning_and_written_anew(text, tmp_path):
    cache = tmp_path / "picks.json"
    cache.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="holds no timed picks") as said:
        first = pick([toy([100, 1000])], CPU, cache)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick([toy([100, 1000])], CPU, cache) == first


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = pick([toy([100, 1000])], CPU, tmp_path / "file" / "picks.json")
    assert chosen(found["toy"]) == {KEY: 1000}


def test_picks_of_another_machine_are_not_used(tmp_path):
    text = picks_as_json(pick([toy([100, 1000])], CPU, tmp_path / "picks.json"), CPU)
    assert use_picks(text, CPU)
    given = json.loads(text)
    given["machine"]["gpu"] = "NVIDIA A100-SXM4-80GB"
    with pytest.warns(UserWarning, match="timed on .*A100.*, and this is .*interpreter"):
        assert not use_picks(json.dumps(given), CPU)
    assert blocks.picked == {}


def test_picks_are_kept_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert cache_file() == Path("/somewhere/cache/tunesmith/picks.json")
    for nothing in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cache_file() == Path.home() / ".cache/tunesmith/picks.json"


def picked_loss(cache: str) -> dict[str, Any]:
    """Both back ends of the loss with a second candidate each, in the interpreter's process."""
    from tunesmith.kernels.lce import anchored, chunked
    from tunesmith.kernels.lce.linear_cross_entropy import linear_cross_entropy
    from tunesmith.kernels.timed_workloads import loss_workload

    rows, gemm = list(chunked.ROW_BLOCKS[0]), list(anchored.GEMM_BLOCKS[0])
    chunked.ROW_BLOCKS[0].append(block(4, 1, BLOCK_V=512))
    anchored.GEMM_BLOCKS[0].append(block(4, 1, BLOCK_C=16, BLOCK_V=512, BLOCK_D=32))
    anchored.GEMM_BLOCKS[0].append(block(4, 1, BLOCK_C=16, BLOCK_V=48, BLOCK_D=32))  # Triton: not a power of two
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pick([loss_workload(5, 24, 500, torch.float32, CPU, trainable=True)], CPU, Path(cache))
        use_picks(picks_as_json(found, CPU), CPU)
        (choice,) = found.values()
        hidden, unembed = torch.randn(3, 24), torch.randn(500, 24)
        asked: dict[Any, Any] = {}
        blocks.asked = asked
        linear_cross_entropy(hidden, unembed, torch.tensor([1, 2, 3]), backend="triton")
        blocks.asked = None
        return {
            "blocks": sorted(f"{key[0]} {block['BLOCK_V']}" for key, block in choice.blocks),
            "backend": choice.backend,
            "milliseconds": choice.milliseconds,
            "rejected": choice.rejected,
            "asked": [kernel for kernel, _ in asked],
        }
    finally:
        blocks.asked = None
        chunked.ROW_BLOCKS[0][:], anchored.GEMM_BLOCKS[0][:] = rows, gemm
        forget_picks()


def test_the_losss_blocks_and_back_end_are_picked_under_the_interpreter(tmp_path, interpreter):
    found = interpreter.run(picked_loss, cache=str(tmp_path / "picks.json"))
    assert found["blocks"] == ["lce_gemm 512", "lce_rows 512"]
    times = {name: ms for name, ms in found["milliseconds"].items() if name != "torch"}
    assert times.keys() == {"anchored", "chunked"}
    assert found["backend"] == min(times, key=times.get)
    assert found["asked"] == [{"anchored": "lce_gemm", "chunked": "lce_rows"}[found["backend"]]]
    assert len(found["rejected"]) == 1
    assert "BLOCK_V': 48" in found["rejected"][0]


def picked_lora(cache: str) -> list[str]:
    """The four passes of a group, each with a second candidate."""
    from tunesmith.kernels.lora import block_tables
    from tunesmith.kernels.timed_workloads import lora_workload

    table = block_tables.INTERPRETER
    before = {name: list(candidates) for name, candidates in table.items()}
    for name, candidates in table.items():
        side = "BLOCK_O" if name in ("up", "grad_up") else "BLOCK_K"
        candidates.append(block(BLOCK_N=64, **{side: 128}))
    try:
        workload = lora_workload(40, 90, [70, 30], [4, 4], torch.float32, CPU, dropout_p=0.1)
        (choice,) = pick([workload], CPU, Path(cache)).values()
        assert choice.rejected == []
        return sorted({key[0] for key, _ in choice.blocks})
    finally:
        for name, candidates in table.items():
            candidates[:] = before[name]


@pytest.mark.slow
def test_loras_blocks_are_picked_under_the_interpreter(tmp_path, interpreter):
    found = interpreter.run(picked_lora, cache=str(tmp_path / "picks.json"))
    assert found == ["lora.down.32", "lora.grad_down.32", "lora.grad_up.16", "lora.up.16"]
