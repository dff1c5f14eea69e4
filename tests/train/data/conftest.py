"""Tiny tokenizers, trained here, and a whole Config around a data file."""

from pathlib import Path

import orjson
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.train.config.config import (
    AdapterConfig,
    AdapterKind,
    BatchConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    MemoryConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Packing,
    ProfileConfig,
    ResumeConfig,
    ScheduleConfig,
    ScheduleKind,
    Targets,
    TrackConfig,
    Truncate,
)

CORPUS = ["hello world, how are you? fine thanks.\n\n\n\n", "the refund takes five days", "helloworld yesno\n\n"] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level BPE; its special tokens are `specials` and eos, bos (put before plain text) and pad when given."""

    def make(template=CHATML, *, specials=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", bos=None, pad=None):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        )
        names = dict.fromkeys(name for name in (*specials, eos, bos, pad) if name)
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        if bos:
            pair = (bos, backend.token_to_id(bos))
            backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=pad)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a file (objects as JSON, bytes as they are) and returns its path as a string."""

    def write(rows, name="data.jsonl"):
        lines = [row if isinstance(row, bytes) else orjson.dumps(row) for row in rows]
        path = Path(tmp_path, name)
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write


@pytest.fixture
def make_config(tmp_path):
    """A Config for some data files; the other groups are as small as they can be."""

    def make(
        train,
        *,
        validation=(),
        validation_fraction=0.0,
        sequence_length=64,
        packing=Packing.best_fit,
        truncate=Truncate.error,
        targets=Targets.all_turns,
        seed=0,
        cache_dir=None,
    ):
        return Config(
            seed=seed,
            model=ModelConfig(name_or_path="unused"),
            data=DataConfig(
                train=train,
                validation=list(validation),
                validation_fraction=validation_fraction,
                truncate=truncate,
                cache_dir=str(cache_dir or tmp_path / "cache"),
            ),
            adapter=AdapterConfig(kind=AdapterKind.none),
            objective=ObjectiveConfig(targets=targets),
            batch=BatchConfig(
                global_batch_size=4, micro_batch_size=2, sequence_length=sequence_length, packing=packing
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            schedule=ScheduleConfig(kind=ScheduleKind.constant, epochs=1),
            engine=EngineConfig(stage=0),
            memory=MemoryConfig(),
            checkpoint=CheckpointConfig(),
            resume=ResumeConfig(source="auto"),
            evaluate=EvaluateConfig(),
            track=TrackConfig(),
            profile=ProfileConfig(),
            cluster=ClusterConfig(),
        )

    return make
