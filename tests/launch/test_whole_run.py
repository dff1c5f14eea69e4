"""The main job from the command line to the answer, by every launcher."""

import json
from pathlib import Path

import orjson
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ("+exp=debug", "schedule.max_steps=4", "evaluate.every_steps=2", "checkpoint.every_steps=2", "data.preview=1")
QUICK += ("evaluate.max_records=2", "evaluate.max_new_tokens=4", "batch.sequence_length=256", "data.truncate=drop")

SHORT = (
    "+exp=debug",
    "schedule.max_steps=2",
    "batch.sequence_length=256",
    "data.validation=[]",
    "data.truncate=drop",
    "data.preview=0",
    "evaluate.generate=false",
    "evaluate.every_steps=null",
)


def rows(run_dir: Path) -> list[dict]:
    return [orjson.loads(line) for line in (run_dir / "metrics.jsonl").read_bytes().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in rows(run_dir) if "train/loss" in row}


@pytest.mark.cold
def test_a_run_leaves_everything(launch, tmp_path):
    done = launch("forked", "train", *QUICK, "output_dir=run")
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "run"
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "report.html", "report.png"}
    assert names >= {"model", "checkpoints", "plan.json"}
    assert "best" not in names
    assert "Traceback" not in done.stderr
    assert "logits within" in done.stdout
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert set(summary["eval"]) == {"loss", "perplexity", "token_accuracy", "exact_match", "rouge_l"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["schedule"]["max_steps"] == 4
    saved = [path.name for path in sorted((run_dir / "checkpoints").iterdir())]
    assert saved == ["latest.json", "step-000002", "step-000004"]
    AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert AutoTokenizer.from_pretrained(run_dir / "model").chat_template
    assert list(losses(run_dir)) == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def found() -> dict[int, float]:
    """Losses by step of a forked run, once one was needed."""
    return {}


@pytest.mark.cold
@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), ("deepspeed", 2), ("torchrun", 1)])
def test_losses_do_not_depend_on_the_launcher(launcher, ranks, launch, tmp_path, found):
    if not found:
        assert launch("forked", "train", *SHORT, "output_dir=here").returncode == 0
        found.update(losses(tmp_path / "here"))
    done = launch(launcher, "train", *SHORT, "output_dir=run", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"ranks {ranks} = 4 sequences of 256 tokens, packed" in " ".join(done.stdout.split())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", ranks)
    assert losses(tmp_path / "run") == pytest.approx(found, abs=1e-5)


def test_a_lora_run_can_be_talked_to_asked_and_merged(launch, tmp_path):
    overrides = ("adapter=lora", "adapter.r=4", "memory=recompute")
    assert launch("forked", "train", *SHORT, *overrides, "output_dir=run").returncode == 0
    assert (tmp_path / "run/model/adapter_model.safetensors").stat().st_size < 600_000
    checkpoint = tmp_path / "run/checkpoints/step-000002/engine/mp_rank_00_model_states.pt"
    assert checkpoint.stat().st_size < 400_000  # the base model is 6.9 MB, its embedding alone 1.6 MB

    answered = launch("forked", "chat", "run=run", "prompt=How often should I water?", "max_new_tokens=5")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()

    (tmp_path / "asked.jsonl").write_text('{"prompt": "How often?", "completion": "Twice a week."}\n' * 3)
    asked = launch("forked", "evaluate", "run=run", "data=asked.jsonl", "max_new_tokens=5", "out=answers.jsonl")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout.splitlines()[-1]) == {
        "exact_match": 0.0,
        "rouge_l": pytest.approx(0, abs=0.5),
        "questions": 3,
    }
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3

    merged = launch("forked", "export", "run=run", "out=merged")
    assert merged.returncode == 0, merged.stderr
    assert "logits within" in merged.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = launch("forked", "export", "run=run", "out=merged")
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_a_finished_run_is_not_trained_again(launch, tmp_path):
    assert launch("forked", "train", *SHORT, "output_dir=run").returncode == 0
    before = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    again = launch("forked", "train", *SHORT, "output_dir=run")
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == before
    refused = launch("forked", "train", *SHORT, "output_dir=run", "resume=never")
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr


def test_a_profile_is_written_for_the_steps_asked_for(launch, tmp_path):
    overrides = ("profile=torch", "profile.start_step=2", "profile.num_steps=1")
    assert launch("forked", "train", *SHORT, *overrides, "output_dir=run").returncode == 0
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    assert any("LinearCrossEntropy" in str(event.get("name")) for event in trace["traceEvents"])
    assert "aten::" in (tmp_path / "run/profile/operations.txt").read_text()
