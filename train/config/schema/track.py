"""Where metrics go in addition to the run folder."""

from dataclasses import dataclass, field
from enum import StrEnum

from tunesmith.train.config.schema.checks import check_no_empty_text, check_positive, check_strings


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class TrackConfig:
    """Where metrics go in addition to the run folder."""

    wandb: WandbMode = WandbMode.auto  # auto: online with an API key, offline without one
    project: str = "tunesmith"  # W&B project
    group: str | None = None  # W&B group, for runs that belong together
    tags: list[str] = field(default_factory=list)  # W&B tags
    every_steps: int = 1  # steps between two rows in metrics.jsonl and W&B

    def __post_init__(self) -> None:
        check_positive("track", every_steps=self.every_steps)
        check_strings("track.tags", self.tags, what="tag")
        check_no_empty_text(self, "track.")
