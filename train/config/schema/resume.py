"""What a run resumes from."""

from dataclasses import dataclass, field

from tunesmith.train.config.schema.checks import check_no_empty_text


@dataclass(kw_only=True)
class ResumeConfig:
    """What the run resumes from."""

    source: str  # auto: output_dir's newest complete checkpoint, if any; never; or a run folder or a checkpoint
    allow: list[str] = field(default_factory=list)  # what may differ from the checkpoint: names from the error, owner

    def __post_init__(self) -> None:
        check_no_empty_text(self, "resume.")
