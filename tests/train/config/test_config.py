"""Every rule of the schema, through the command line: what is wrong, where, and what to do."""

import ast
import traceback
from functools import cache
from pathlib import Path

import pytest

from tunesmith.train.config.compose import compose_config
from tunesmith.train.config.config import Config
from tunesmith.train.config.tree import schema_keys
from tunesmith.train.errors import ConfigError

RULES = [  # overrides; the last one is the key that is named; words of the problem; words of the remedy
    (["batch.global_batch_size=0"], "global_batch_size must be above 0, not 0.", "give a finite number above 0."),
    (["batch.micro_batch_size=-1"], "micro_batch_size must be above 0, not -1.", "above 0"),
    (["batch.sequence_length=0"], "sequence_length must be above 0", "above 0"),
    (["optimizer.learning_rate=0"], "learning_rate must be above 0, not 0.0.", "above 0"),
    (["optimizer.learning_rate=inf"], "learning_rate must be finite, not inf.", "finite number"),
    (["optimizer.learning_rate=nan"], "learning_rate must be above 0, not nan.", "finite number"),
    (["optimizer.eps=0"], "eps must be above 0", "above 0"),
    (["optimizer.max_grad_norm=0"], "max_grad_norm must be above 0", "above 0"),
    (["optimizer.max_skipped_steps=0"], "max_skipped_steps must be above 0", "above 0"),
    (["optimizer.weight_decay=-0.1"], "weight_decay must be at least 0, not -0.1.", "0 or a finite number"),
    (["optimizer.weight_decay=nan"], "weight_decay must be at least 0, not nan.", "0 or a finite number"),
    (["optimizer.beta1=1"], "beta1 must be at least 0 and below 1, not 1.0.", "share of the whole"),
    (["optimizer.beta2=-0.1"], "beta2 must be at least 0 and below 1, not -0.1.", "share of the whole"),
    (["adapter=lora", "adapter.r=0"], "r must be above 0", "above 0"),
    (["adapter=lora", "adapter.alpha=-1"], "alpha must be above 0", "above 0"),
    (["adapter=lora", "adapter.dropout=1"], "dropout must be at least 0 and below 1", "share of the whole"),
    (["adapter=lora", "adapter.r=null"], "a LoRA adapter needs r.", "set adapter.r and adapter.alpha."),
    (["adapter=lora", "adapter.alpha=null"], "a LoRA adapter needs alpha.", "set adapter.r and adapter.alpha."),
    (["adapter=lora", "adapter.target_modules=[]"], "target_modules is empty", "all-linear"),
    (["adapter=lora", "adapter.target_modules=[a,'']"], "must be a module name or a list of", "write one module name"),
    (["adapter=lora", "adapter.target_modules=3"], "must be a module name or a list of", "[one,two]"),
    (["adapter=lora", "adapter.num_layers=2"], "num_layers=2 does not go with adapter.kind=lora.", "last_layers"),
    (["adapter=last_layers", "adapter.num_layers=null"], "num_layers=None does not go with", "num_layers=<n>"),
    (["adapter=last_layers", "adapter.num_layers=0"], "num_layers must be above 0", "above 0"),
    (["adapter.r=4"], "adapter.r=4 means nothing with adapter.kind=none.", "choose adapter=lora"),
    (["adapter.alpha=4"], "adapter.alpha=4.0 means nothing", "choose adapter=lora"),
    (["adapter.dropout=0.1"], "adapter.dropout=0.1 means nothing", "choose adapter=lora"),
    (["adapter.use_dora=true"], "adapter.use_dora=True means nothing", "choose adapter=lora"),
    (["adapter.use_rslora=true"], "adapter.use_rslora=True means nothing", "choose adapter=lora"),
    (["adapter.target_modules=[q_proj]"], "means nothing with adapter.kind=none", "choose adapter=lora"),
    (["model.name_or_path=''"], "the model has no name.", "give a hub id or a folder."),
    (["model.revision=''"], "model.revision is empty.", "give it a value, or leave it out."),
    (["data.train=[]"], "there is no training data.", "set data.train to a JSONL file."),
    (["data.train=null"], "data.train must be a path or a list of paths, not None.", "write one path"),
    (["data.train=[a.jsonl,null]"], "data.train must be a path or a list of paths", "[one,two]"),
    (["data.train=['']"], "data.train must be a path or a list of paths", "[one,two]"),
    (["data.validation=null"], "data.validation must be a path or a list of paths, not None.", "write one path"),
    (["data.validation_fraction=1"], "validation_fraction must be at least 0 and below 1", "share of the whole"),
    (["data.validation_fraction=0.1"], "data.validation and data.validation_fraction are both set", "keep one of them"),
    (["data.preview=-1"], "preview must be at least 0, not -1.", "0 or a finite number"),
    (["data.cache_dir=''"], "data.cache_dir is empty.", "leave it out"),
    (["data.chat_template=''"], "data.chat_template is empty.", "leave it out"),
    (["schedule.max_steps=0"], "max_steps must be above 0", "above 0"),
    (["schedule.max_steps=null", "schedule.epochs=inf"], "epochs must be finite, not inf.", "finite number"),
    (["schedule.epochs=2", "schedule.max_steps=6"], "exactly one must be set", "schedule.epochs=null"),
    (["schedule.epochs=null", "schedule.max_steps=null"], "exactly one must be set", "schedule.epochs=null"),
    (["schedule.warmup_fraction=1"], "warmup_fraction must be at least 0 and below 1", "share of the whole"),
    (["schedule.final_fraction=-1"], "final_fraction must be at least 0 and below 1", "share of the whole"),
    (["schedule=constant", "schedule.final_fraction=0.1"], "means nothing with schedule.kind=constant", "leave it out"),
    (["schedule=wsd", "schedule.decay_fraction=0.99"], "leave room for warmup_fraction=0.03", "at most 0.97"),
    (["schedule=wsd", "schedule.decay_fraction=0"], "decay_fraction=0.0 must be above 0", "at most 0.97"),
    (["engine.stage=4"], "ZeRO stages are 0 to 3, not 4.", "choose engine=ddp, zero1, zero2 or zero3."),
    (["engine.stage=0", "engine.offload_optimizer=cpu"], "offload needs ZeRO 1 or higher.", "set engine.stage"),
    (["engine.offload_weights=cpu"], "offloaded weights need ZeRO 3.", "set engine=zero3_offload."),
    (["engine.offload_optimizer=nvme"], "NVMe offload needs ZeRO 3.", "set engine=zero3_nvme."),
    (["engine=zero3", "engine.nvme_path=/x"], "nothing is offloaded to nvme", "or neither"),
    (["engine=zero3_nvme", "engine.nvme_path=null"], "NVMe offload needs engine.nvme_path.", "/local/nvme"),
    (["engine=zero3_nvme", "engine.nvme_path=''"], "engine.nvme_path is empty.", "leave it out"),
    (["memory.recompute=1.5"], "recompute=1.5 is no share of the blocks.", "give a number from 0 to 1, or null."),
    (["memory.recompute=-0.1"], "recompute=-0.1 is no share of the blocks.", "give a number from 0 to 1, or null."),
    (["memory.limit_gib=0"], "limit_gib must be above 0", "above 0"),
    (["checkpoint.every_steps=0"], "every_steps must be above 0", "above 0"),
    (["checkpoint.keep_last=1"], "keep_last=1 leaves nothing to go back to", "keep at least 2"),
    (
        ["checkpoint.every_steps=null", "checkpoint.every_minutes=null", "optimizer.on_spike=rollback"],
        "on_spike=rollback needs checkpoints",
        "set checkpoint.every_steps",
    ),
    (["checkpoint.every_minutes=0"], "every_minutes must be above 0", "above 0"),
    (["checkpoint.keep_every_steps=0"], "keep_every_steps must be above 0", "above 0"),
    (["checkpoint.max_failed_saves=0"], "max_failed_saves must be above 0", "above 0"),
    (["evaluate.every_steps=0"], "every_steps must be above 0", "above 0"),
    (["evaluate.batch_size=0"], "batch_size must be above 0", "above 0"),
    (["evaluate.max_new_tokens=0"], "max_new_tokens must be above 0", "above 0"),
    (["evaluate.max_records=-3"], "max_records must be above 0, not -3.", "above 0"),
    (["evaluate.patience=0"], "patience must be above 0", "above 0"),
    (["evaluate.metric=''"], "evaluate.metric is empty.", "leave it out"),
    (["objective.kind=os.path"], "'os.path' cannot name an objective.", "a file of train/objective/, such as sft"),
    (["objective.kind=''"], "'' cannot name an objective.", "such as sft"),
    (["evaluate.num_samples=-1"], "num_samples must be at least 0", "0 or a finite number"),
    (
        ["evaluate.every_steps=null", "evaluate.patience=2"],
        "early stopping needs evaluations.",
        "set evaluate.every_steps",
    ),
    (["data.validation=[]", "evaluate.every_steps=3"], "there are no validation records", "data.validation_fraction"),
    (["track.every_steps=0"], "every_steps must be above 0", "above 0"),
    (["track.project=''"], "track.project is empty.", "leave it out"),
    (["profile.start_step=0"], "start_step must be above 0", "above 0"),
    (["profile.num_steps=0"], "num_steps must be above 0", "above 0"),
    (["cluster.timeout_minutes=0"], "timeout_minutes must be above 0", "above 0"),
    (["cluster.timeout_minutes=1e9"], "timeout_minutes=1e+09 is more than a year.", "such as 10"),
    (["cluster.nodes=0"], "nodes must be above 0", "above 0"),
    (["cluster.max_restarts=-1"], "max_restarts must be at least 0", "0 or a finite"),
    (["cluster.partition='-p;x'"], "partition='-p;x' is not a value that SLURM takes.", "letters, digits"),
    (["cluster.time=soon"], "time='soon' is not a value that SLURM takes.", "D-HH:MM:SS"),
    (["cluster.modules=['a;b']"], "'a;b' in modules is not a module.", "cuda/12.8"),
    (["cluster.sbatch=['-p main']"], "'-p main' in sbatch is not an option", "--name=value"),
    (["cluster.sbatch=['--array=1-4']"], "--array=1-4 is not for cluster.sbatch", "for arrays launch/sweep.py"),
    (["cluster.time=5"], "time=5 leaves no time to train", "give at least 360 s"),
    (["cluster.env=['A B']"], "'A B' in env is not a variable.", "NAME=value"),
    (["cluster.exclude=['n1;x']"], "'n1;x' in exclude is not a node.", "gpu[01-04]"),
    (["cluster.container_mounts=['']"], "must be a folder or a list of folders", "write one folder"),
    (["cluster.signal_seconds=5"], "signal_seconds=5 is not between 60 and 65535.", "looks at its clock"),
    (["cluster.account=''"], "account='' is not a value that SLURM takes.", "letters, digits"),
    (["name=a/b"], "'a/b' cannot name a folder.", "use letters, digits, - and _."),
    (["name=.."], "'..' cannot name a folder.", "use letters"),
    (['name="a\nb"'], r"'a\nb' cannot name a folder.", "use letters"),
    ([f"name={'x' * 200}"], "cannot name a folder", "use letters"),
    (["name=''"], "'' cannot name a folder.", "use letters"),
    (["seed=-1"], "seed=-1 is outside 0 to 4294967295.", "choose a seed from that range."),
    (["seed=4294967296"], "is outside 0 to 4294967295.", "choose a seed"),
    (["output_dir=''"], "output_dir is empty.", "leave it out"),
    (["resume.source=''"], "resume.source is empty.", "leave it out"),
    *(
        ([f"model.trust_remote_code={value}"], "must be true or false, not", "without quotes")
        for value in ("yes", "1", "null", '"true"', "maybe", "[true]")
    ),
]


CONFIG_FOLDER = Path(__file__).parents[3] / "train/config"
SCHEMA_FILES = [CONFIG_FOLDER / "config.py", *sorted((CONFIG_FOLDER / "schema").glob("*.py"))]


@cache
def error_of(*overrides: str) -> tuple[str, str]:
    """The text of the error that the overrides of +exp=debug cause, and `file.py:line` of the check that raised it."""
    with pytest.raises(ConfigError) as caught:
        compose_config(["+exp=debug", *overrides]).config.batch.gradient_accumulation_steps(world_size=4)
    frames = traceback.extract_tb(caught.value.__traceback__)
    places = [(Path(frame.filename).resolve(), frame.lineno) for frame in frames]
    path, line = next(place for place in reversed(places) if place[0] in SCHEMA_FILES)
    return str(caught.value), f"{path.name}:{line}"


@pytest.mark.parametrize(("overrides", "problem", "remedy"), RULES, ids=lambda value: str(value)[:60])
def test_a_broken_rule_says_what_where_and_what_to_do(overrides: list[str], problem: str, remedy: str) -> None:
    what_line, at_line, do_line = error_of(*overrides)[0].splitlines()
    assert what_line.startswith("ConfigError: ")
    assert problem in what_line
    assert at_line.startswith(f"  at: {overrides[-1].split('=')[0]} (command line: ")
    assert do_line.startswith("  do: ")
    assert remedy in do_line


UNEVEN = ("batch.micro_batch_size=8", "batch.global_batch_size=100")


def test_a_batch_that_does_not_divide_names_the_sizes_that_do() -> None:
    assert error_of(*UNEVEN)[0].splitlines() == [
        "ConfigError: global_batch_size=100 does not divide into forwards of 32 sequences "
        "(micro_batch_size=8 x world_size=4).",
        "  at: batch.global_batch_size",
        "  do: set batch.global_batch_size to 96 or 128, or change batch.micro_batch_size.",
    ]


@pytest.mark.slow
def test_every_check_of_the_schema_is_broken_by_one_of_these_tests() -> None:
    raised = {error_of(*overrides)[1] for overrides in [*(rule[0] for rule in RULES), UNEVEN]}
    for path in SCHEMA_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                lines = {f"{path.name}:{line}" for line in range(node.lineno, (node.end_lineno or 0) + 1)}
                assert lines & raised, f"{path.name}:{node.lineno} is raised by no test"


@pytest.mark.parametrize("value", ["true", "false"])
def test_trust_remote_code_takes_true_and_false(value: str) -> None:
    composed = compose_config(["+exp=debug", f"model.trust_remote_code={value}"])
    assert composed.config.model.trust_remote_code is (value == "true")


def test_trust_remote_code_is_off_unless_asked_for() -> None:
    assert compose_config(["+exp=debug"]).config.model.trust_remote_code is False


def test_the_schema_imports_neither_hydra_nor_torch() -> None:
    for path in SCHEMA_FILES:
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not imported & {"hydra", "omegaconf", "torch", "transformers", "deepspeed"}


def test_every_group_of_the_design_is_in_the_schema_and_has_its_file() -> None:
    groups = {key.split(".")[0] for key in schema_keys(Config) if "." in key}
    assert {path.stem for path in SCHEMA_FILES} - {"config", "checks", "__init__"} == groups
    assert " ".join(sorted(groups)) == (
        "adapter batch checkpoint cluster data engine evaluate memory model objective optimizer profile resume "
        "schedule track"
    )
