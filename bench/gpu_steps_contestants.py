"""Whole optimizer steps for gpu_steps.py: ours by the real engine, and transformers + PEFT with what makes them fast.

A contestant is built for a case and then does step(turn) -> loss. All draw the same random weights from one seed and
learn from the same tokens. Every sequence is one record, so that the peers' sdpa needs no mask and takes its flash
kernel: that is them at their best.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SEED, LEARNING_RATE, BETAS, EPS, MAX_GRAD_NORM = 0, 2e-4, (0.9, 0.999), 1e-8, 1.0
RANK, ALPHA, DROPOUT = 16, 32, 0.1
INPUTS = 2  # batches that turns go through
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "7B": {  # the widths of Qwen2.5-7B
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 152064,
    },
    "1B": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Case:
    model: str
    adapter: str  # lora or none
    sequences: int = 2
    sequence_length: int = 4096
    tiny: bool = False  # the shape is then TINY_SHAPE, in fp32, and says nothing of speed

    @property
    def name(self) -> str:
        return f"{self.model} {'LoRA r=16' if self.adapter == 'lora' else 'full'}"

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def shape(self) -> dict[str, Any]:
        return TINY_SHAPE if self.tiny else SHAPES[self.model]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def dropout(self) -> float:
        return 0.0 if self.tiny else DROPOUT  # so that tiny losses are the same to the last bits

    def input_ids(self) -> torch.Tensor:
        """[INPUTS, sequences, sequence_length] int64."""
        drawn = torch.Generator().manual_seed(SEED)
        return torch.randint(
            0, self.shape["vocab_size"], (INPUTS, self.sequences, self.sequence_length), generator=drawn
        )

    @classmethod
    def of(cls, text: str) -> "Case":
        return cls(**json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))


Step = Callable[[int], torch.Tensor]  # the number of the turn -> its loss, a mean over targets


def hf_config(case: Case) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**case.shape, max_position_embeddings=case.sequence_length, rope_theta=500000.0)


def ours(case: Case, device: torch.device) -> Step:
    """The engine, kernels and optimizer step of a run; DeepSpeed has to be there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed picks its accelerator while it is imported
    from tunesmith.train.config.compose import compose_config
    from tunesmith.train.data.example import Example
    from tunesmith.train.data.store import TokenStore, write_store
    from tunesmith.train.data.tokenizer import load_tokenizer
    from tunesmith.train.engine import Engine
    from tunesmith.train.model.kernel_choice import choose_kernels
    from tunesmith.train.model.load import check_model, load_model
    from tunesmith.train.model.lora_layers import use_lora_kernels
    from tunesmith.train.model.packing import settle
    from tunesmith.train.model.timed_picks import use_timed_picks
    from tunesmith.train.objective.objective import make_objective
    from tunesmith.train.ranks.distributed import World, start
    from tunesmith.train.run.guards.stragglers import BusyClock
    from tunesmith.train.run.loop import optimizer_step
    from tunesmith.train.run.memory_plan import settle_memory

    world = World()
    if not torch.distributed.is_initialized():
        start(world, device, timeout_minutes=10)
    folder = Path(tempfile.mkdtemp(prefix="gpu_steps"))
    hf_config(case).save_pretrained(folder)
    config = compose_config(_overrides(case, folder)).config
    settle(config, check_model(config), device, print)
    settle_memory(config, check_model(config), world, device, print)
    kernels = choose_kernels(config, device)
    with device:
        model = load_model(config, world)
    use_lora_kernels(model, kernels, sharded=False)
    if str(kernels) == "triton":
        use_timed_picks(model, config, world, device, print)
    engine = Engine(model, config, world, device, kernels, print)
    engine.train()
    weights = torch.ones(case.sequence_length).numpy()
    examples = [Example("drawn", ids.int().numpy(), weights) for ids in case.input_ids().flatten(0, 1)]
    packing = config.batch.packing
    write_store(folder / "store", examples, sequence_length=case.sequence_length, packing=packing)
    store = TokenStore(folder / "store", sequence_length=case.sequence_length, packing=packing)
    objective = make_objective(config, load_tokenizer(compose_config(["model=tiny", "data=example"]).config.model,
                                                      config.data))  # fmt: skip
    busy, micro = BusyClock(device, forward_waits=False), config.batch.micro_batch_size

    def step(turn: int) -> torch.Tensor:
        first = turn % INPUTS * case.sequences
        starts = range(first, first + case.sequences, micro)
        batches = [store.batch(range(at, at + micro), pad_token_id=0).to(device) for at in starts]
        done = optimizer_step(engine, objective, batches, busy=busy, before_update=lambda: None)
        return torch.tensor(done.loss)

    return step


def _overrides(case: Case, folder: Path) -> list[str]:
    lora = ["adapter=lora", f"adapter.r={RANK}", f"adapter.alpha={ALPHA}", f"adapter.dropout={case.dropout}"]
    return [
        "model=tiny",
        f"model.name_or_path={folder}",
        "data=example",
        "data.validation=[]",
        *(lora if case.adapter == "lora" else ["adapter=none"]),
        f"engine={'ddp' if case.tiny else 'zero1'}",
        f"engine.precision={'fp32' if case.tiny else 'bf16'}",
        f"cluster.device={'cpu' if case.tiny else 'cuda'}",
        f"batch.sequence_length={case.sequence_length}",
        f"batch.global_batch_size={case.sequences}",
        f"batch.micro_batch_size={case.sequences}",
        f"seed={SEED}",
        f"optimizer.learning_rate={LEARNING_RATE}",
        f"optimizer.beta1={BETAS[0]}",
        f"optimizer.beta2={BETAS[1]}",
        f"optimizer.eps={EPS}",
        f"optimizer.max_grad_norm={MAX_GRAD_NORM}",
    ]


def peer_model(case: Case, device: torch.device) -> Any:
    """As Trainer with bf16=True has it: frozen weights in bf16 and adapters in fp32, or all in fp32; autocast."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(hf_config(case), dtype=case.dtype)
    model.config.use_cache = False
    return with_lora(model, case) if case.adapter == "lora" else model.float()


def with_lora(model: Any, case: Case) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def stepping(
    case: Case, device: torch.device, model: Any, loss_of: Callable[[Any, torch.Tensor], torch.Tensor]
) -> Step:
    """The loop of Trainer without what it adds: autocast, clipping, torch's fused AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    inputs = case.input_ids()
    model.train()

    def step(turn: int) -> torch.Tensor:
        input_ids = inputs[turn % INPUTS].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not case.tiny):
            loss = loss_of(model, input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def own_loss(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, labels=input_ids).loss


def plain(case: Case, device: torch.device) -> Step:
    """transformers, and PEFT for LoRA."""
    return stepping(case, device, peer_model(case, device), own_loss)


def liger(case: Case, device: torch.device) -> Step:
    """The same with Liger's RMSNorm, RoPE, SwiGLU and fused linear cross-entropy."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return stepping(case, device, peer_model(case, device), own_loss)


def compiled(case: Case, device: torch.device) -> Step:
    """Every block through torch.compile; one compilation serves them all."""
    if device.type != "cuda":
        raise ImportError("torch.compile takes minutes without a GPU")
    model = peer_model(case, device)
    for block in (model.get_base_model() if case.adapter == "lora" else model).model.layers:
        block.compile()
    return stepping(case, device, model, own_loss)


def trl_head(case: Case, device: torch.device) -> Step:
    """TRL's model of SFTTrainer: its fused head, which is its default, beside Liger's block where that is there."""
    from trl.trainer.utils import add_fused_lm_head

    if device.type == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
    model = peer_model(case, device)
    add_fused_lm_head(
        model.get_base_model() if case.adapter == "lora" else model, outputs=("log_probs", "entropy", "is_top1")
    )

    def loss_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, labels=input_ids, fused_lm_head=True).loss

    return stepping(case, device, model, loss_of)


def unsloth(case: Case, device: torch.device) -> Step:
    """Unsloth's own model and LoRA; full fine-tuning is not its case. Nobody has run this yet."""
    from unsloth import FastLanguageModel

    if case.adapter != "lora":
        raise ImportError("full fine-tuning is not its case")
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(prefix="gpu_steps") as folder:
        from transformers import AutoModelForCausalLM

        with device:
            AutoModelForCausalLM.from_config(hf_config(case), dtype=case.dtype).save_pretrained(folder)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=case.sequence_length, dtype=case.dtype, load_in_4bit=False
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=case.dropout, target_modules=names, random_state=SEED,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    return stepping(case, device, model, own_loss)


BUILD: dict[str, Callable[[Case, torch.device], Step]] = {
    "ours": ours,
    "liger": liger,
    "trl_head": trl_head,
    "compiled": compiled,
    "plain": plain,
    "unsloth": unsloth,
}
