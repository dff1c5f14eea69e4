"""The training engine. With zero/ and optimizer.py, the only place that knows DeepSpeed."""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.train.config.config import AdapterKind, Config, Kernels
from tunesmith.train.errors import TrainingError
from tunesmith.train.files.background_writer import RankFiles
from tunesmith.train.model.output_head import TargetRows
from tunesmith.train.model.router_loss import find_router_loss
from tunesmith.train.model.scorer import Scorer
from tunesmith.train.optimizer import apply_settings, make_optimizer, parameter_groups, set_learning_rate, state_of
from tunesmith.train.ranks.distributed import World, barrier, numbers_on
from tunesmith.train.zero import universal
from tunesmith.train.zero.checkpoint_engine import EngineFiles
from tunesmith.train.zero.deepspeed import deepspeed
from tunesmith.train.zero.deepspeed_config import deepspeed_config, is_plain_fp32, raw_keys_explained
from tunesmith.train.zero.held_memory import held_bytes
from tunesmith.train.zero.sharding import full_shape, gathered
from tunesmith.train.zero.skip_on_device import can_skip_on_device, is_invalid, skipping_on_device

TAG = "engine"  # folder of DeepSpeed's files inside a checkpoint


@dataclass(frozen=True)
class Update:
    """What one optimizer update did."""

    norm: torch.Tensor  # [] float64, of the gradient before clipping; inf where it was not finite, and not applied

    @property
    def grad_norm(self) -> float:
        """Waits for the device."""
        return float(self.norm)

    @property
    def applied(self) -> bool:
        """Waits for the device."""
        return math.isfinite(self.grad_norm)


def leave_out_frozen_twins(model: nn.Module) -> None:
    """Keeps the second name of a frozen tied weight out of state_dict().

    DeepSpeed 0.19.8 leaves frozen weights out of a checkpoint by their first name only: with a tied head, every LoRA
    checkpoint would hold the whole embedding.
    """
    first = {name for name, _ in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    twins = {name for name, parameter in every if name not in first and not parameter.requires_grad}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in twins:
            state.pop(prefix + name, None)

    model.register_state_dict_post_hook(drop)


class Engine:
    """A model on all ranks: forward, backward, update, whole parameters, save and load.

    `scorer` is what an objective asks; kernels are those of choose_kernels(); warn gets a sentence where one cannot be
    used. Every rank makes its engine at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        world: World,
        device: torch.device,
        kernels: Kernels,
        warn: Callable[[str], None],
    ) -> None:
        self.device = device
        self.world = world
        self._config = config
        groups = parameter_groups(model, config.optimizer.weight_decay)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._group_names = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        self._group_settings = [{key: group[key] for key in group if key != "params"} for group in groups]
        target_rows, router_loss = TargetRows(model), find_router_loss(model, config.model, warn)
        if device.type == "cpu":
            model.to(device)
        if self._frozen_left_out:
            leave_out_frozen_twins(model)
        trained = [math.prod(full_shape(parameter)) for group in groups for parameter in group["params"]]
        optimizer = make_optimizer(groups, config)
        with raw_keys_explained(config):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config, world.world_size, trained),
                dist_init_required=False,
            )
        self._files = EngineFiles()
        self._engine.checkpoint_engine = self._files
        self._engine._copy_recovery_script = lambda _: None  # a checkpoint holds no programs
        self._plain_fp32 = is_plain_fp32(config.engine)
        self._skips_on_device = can_skip_on_device(config)
        self.scorer = Scorer(self.module, self._engine, target_rows, kernels, device, router_loss, warn)

    @property
    def module(self) -> Any:
        """The model itself, with the engine's hooks on it."""
        return self._engine.module

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a loss that is already this rank's share of the global loss.

        DeepSpeed averages over ranks, which the factor undoes, and would divide by the accumulation steps, which
        scale_wrt_gas turns off. The second factor is 1 for a finite loss and NaN otherwise: a loss can be infinite
        with finite gradients, and this makes the gradients say so, without waiting for the device.
        """
        poison = 1.0 + 0.0 * loss.detach()
        self._engine.backward(loss * (self.world.world_size * poison), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # between boundaries: counts the micro step, changes no weight

    def step(self) -> Update:
        """One update from the gradients of all ranks; left out when they are not finite. Waits for nothing, where the
        device can leave it out by itself.
        """
        if self._plain_fp32:
            return self._plain_step()
        with skipping_on_device(self._engine.optimizer) if self._skips_on_device else nullcontext():
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if not self._engine.was_step_applied() or norm is None:
            norm = math.inf
        as_tensor = norm.double() if isinstance(norm, torch.Tensor) else numbers_on(self.device, [norm])[0]
        return Update(as_tensor.masked_fill(is_invalid(as_tensor), math.inf))

    def _plain_step(self) -> Update:
        """Norm, clipping and skipping, which DeepSpeed leaves to us where it steps torch's optimizer itself."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.optimizer.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._config.optimizer.max_grad_norm, norm)
        optimizer = self._engine.optimizer
        optimizer.found_inf = is_invalid(norm).float()
        try:
            self._engine.step()
        finally:
            del optimizer.found_inf
        return Update(norm.double().masked_fill(is_invalid(norm), math.inf))

    def set_learning_rate(self, learning_rate: float) -> None:
        set_learning_rate(self._engine.optimizer, learning_rate)

    def whole_parameters(self, names: Container[str]) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters, whole while each is held, one at a time. Every rank must go through all of them."""
        for name, parameter in self.module.named_parameters():
            if name in names:
                with gathered([parameter]):
                    yield name, parameter

    def save(self, folder: Path, rank_files: RankFiles) -> None:
        """This rank's part of weights, optimizer state and loss scale; frozen weights are left out with an adapter.

        What goes wrong with the disk stands in rank_files: every rank comes to the end of this.
        """
        self._files.rank_files = rank_files
        try:
            self._engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state={"parameter_groups": self._group_names},  # stage 0 numbers its parameters and names none
                save_latest=False,
                exclude_frozen_parameters=self._frozen_left_out,
            )
        except OSError as error:  # copying state off an NVMe disk: the one thing that DeepSpeed writes by itself
            rank_files.fail(error)
            self._leave_save()
        finally:
            self._files.rank_files = None
        for path in sorted((folder / TAG / "offloaded_tensors" / f"rank{self.world.rank}").rglob("*")):
            if path.is_file():
                rank_files.add_written(path)

    def _leave_save(self) -> None:
        """What DeepSpeed's save_checkpoint would still have done together with the other ranks."""
        if self._engine._optimizer_has_ckpt_event_epilogue():
            self._engine.optimizer.checkpoint_event_epilogue()
        barrier()

    def load(self, folder: Path) -> None:
        """Restores what save() wrote. Raises TrainingError when the files do not fit this engine."""
        try:
            loaded, _ = self._engine.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=not self._frozen_left_out, load_lr_scheduler_states=False
            )
        except TrainingError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"the checkpoint does not load: {type(error).__name__}: {reason}",
                at=str(folder),
                do="resume with the same ranks, engine, adapter and model, or start with resume=never.",
            ) from error
        if loaded is None:
            raise TrainingError(
                "the checkpoint holds no engine state.", at=str(folder), do="choose another checkpoint."
            )
        self._apply_settings()

    def load_converted(self, folder: Path) -> None:
        """Restores what save() wrote on other ranks or at another stage, from its whole parameters (conversion.py)."""
        universal.load(self._engine, folder, self._group_names, state_of)
        self._apply_settings()

    def _apply_settings(self) -> None:
        optimizer = self._engine.optimizer
        apply_settings(optimizer, self._group_settings, self._config)
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = self._config.optimizer.max_grad_norm or 0.0

    def held_bytes(self) -> dict[str, int]:
        """Bytes on this rank's device that outlive a step, by what they are for."""
        return held_bytes(self.module, self._engine.optimizer, self.device)

    def close(self) -> None:
        """Takes the engine down, so that another can be made in this process; nothing else may be called then."""
        self._engine.destroy()
        del self._engine, self.scorer

    @property
    def _frozen_left_out(self) -> bool:
        return self._config.adapter.kind is not AdapterKind.none
