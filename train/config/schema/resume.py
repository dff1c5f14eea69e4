"""What a run goes on from."""

from dataclasses import dataclass, field

from tunesmith.train.config.schema.checks import check_no_empty_text


@dataclass(kw_only=True)
class ResumeConfig:
    """What the run goes on from."""

    source: str  # auto: output_dir's newest whole checkpoint, if it has any; never; or a run folder or a checkpoint
    allow: list[str] = field(default_factory=list)  # what may differ from the checkpoint: names from the error, owner

    def __post_init__(self) -> None:
        check_no_empty_text(self, "resume.")
