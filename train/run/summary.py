"""The run in words: what is about to happen, and what came of it."""

import platform
import shlex
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunesmith.train.checkpoint import fingerprint
from tunesmith.train.config.config import AdapterKind, Packing
from tunesmith.train.files import run_folder
from tunesmith.train.model.adapter import adapted_lines
from tunesmith.train.run.setup import Run, Session


def start_rows(run: Run, session: Session) -> list[tuple[str, str]]:
    """What is shown before the first step."""
    config, size, report = run.config, session.size, run.data.report
    share = f"{size.trainable / size.parameters:.2%}"
    rows = [
        ("model", f"{config.model.name_or_path}, {millions(size.parameters)} parameters, {config.engine.precision}"),
        ("trained", f"{millions(size.trainable)} parameters ({share}), {_adapter_words(run)}"),
        *[("", line) for line in adapted_lines(session.engine.module)],
        *_router_rows(session),
        *[("data" if number == 0 else "", line) for number, line in enumerate(report.lines())],
        ("batch", batch_words(run)),
        ("steps", f"{run.feed.total_steps} = {run.feed.epoch_at(run.feed.total_steps):.2f} epochs"),
        ("learning rate", f"{config.optimizer.learning_rate:g}, {schedule_words(run)}"),
        ("engine", f"{_engine_words(run)} on {run.world.world_size} {run.device.type} rank(s)"),
        ("folder", str(run.run_dir)),
    ]
    if session.resumed_from:
        rows.append(("resumed", f"from {session.resumed_from}, step {session.state.step}"))
    return rows


def _adapter_words(run: Run) -> str:
    adapter = run.config.adapter
    if adapter.kind is AdapterKind.lora:
        kind = "DoRA" if adapter.use_dora else "rsLoRA" if adapter.use_rslora else "LoRA"
        return f"{kind} r={adapter.r} alpha={adapter.alpha:g}"
    return f"the last {adapter.num_layers} blocks" if adapter.kind is AdapterKind.last_layers else "full fine-tuning"


def _router_rows(session: Session) -> list[tuple[str, str]]:
    """Of a mixture of experts whose routers are asked to spread the tokens, or could be."""
    router_loss = session.engine.scorer.router_loss
    if router_loss is None:
        return []
    words = f"auxiliary loss x {router_loss.coefficient:g} is added to the loss, logged as train/router_aux_loss"
    return [("routers", f"{words}; model.router_aux_loss_coef=0 leaves it out")]


def batch_words(run: Run) -> str:
    """The batch arithmetic, such as: micro 4 x accumulation 2 x ranks 2 = 16 sequences of 256 tokens, packed."""
    batch, ranks = run.config.batch, run.world.world_size
    packed = "packed" if batch.packing is Packing.best_fit else "one record each"
    return (
        f"micro {batch.micro_batch_size} x accumulation {batch.gradient_accumulation_steps(ranks)} x ranks {ranks} "
        f"= {batch.global_batch_size} sequences of {batch.sequence_length} tokens, {packed}"
    )


def schedule_words(run: Run) -> str:
    """The schedule, and the learning rate it gives at the start, in the middle and at the end."""
    schedule, top, last = run.config.schedule, run.config.optimizer.learning_rate, run.feed.total_steps - 1
    points = ", ".join(
        f"{top * run.learning_rate_factor(step):.2g} at {step + 1}" for step in sorted({0, last // 2, last})
    )
    return f"{schedule.kind} ({points})"


def _engine_words(run: Run) -> str:
    engine = run.config.engine
    offload = [
        name
        for name, where in (("optimizer", engine.offload_optimizer), ("weights", engine.offload_weights))
        if where != "none"
    ]
    return f"ZeRO {engine.stage}" + (f", {' and '.join(offload)} offloaded" if offload else "")


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def summarise(run: Run, session: Session, *, evaluation: dict[str, float], proof: str) -> dict[str, Any]:
    """The content of summary.json."""
    state, metric = session.state, run.config.evaluate.metric
    return {
        "status": "finished",
        "name": run.config.name,
        "steps": state.step,
        "epochs": run.feed.epoch_at(state.step),
        "train_loss": state.train_loss,
        "eval": {name.removeprefix("eval/"): value for name, value in evaluation.items()},
        "best": {"step": state.best_step, metric.replace("/", "_"): state.best_metric},
        "skipped_steps": state.skipped_steps,
        "tokens_seen": state.tokens_seen,
        "seconds": state.train_seconds,
        "tokens_per_second": state.tokens_seen / state.train_seconds if state.train_seconds else None,
        "mfu": session.throughput.run_mfu,
        "peak_memory_gib": run.reporter.peak_memory_gib,
        "world_size": run.world.world_size,
        "model": {
            "name_or_path": run.config.model.name_or_path,
            "parameters": session.size.parameters,
            "trainable": session.size.trainable,
            "saved": proof,
        },
        "data": run.data.report.as_dict(),
        "identity": asdict(fingerprint.of_finished(run.config, run.world, run.data.fingerprint, run.data.parts)),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft", "triton")}
        | {"python": platform.python_version()},
    }


def end_rows(summary: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """What is shown when a run is done."""
    return [
        ("steps", f"{summary['steps']}, {summary['epochs']:.2f} epochs"),
        *[(f"eval {name.replace('_', ' ')}", f"{value:.4f}") for name, value in summary["eval"].items()],
        ("model", f"{run_dir / run_folder.MODEL} ({summary['model']['saved']})"),
        ("report", str(run_dir / "report.html")),
        ("talk to it", f"python launch/chat.py {shlex.quote(f'run={run_dir}')}"),
    ]
