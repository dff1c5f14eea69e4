"""What is learned."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tunesmith.train.errors import ConfigError


class Targets(StrEnum):
    all_turns = "all_turns"
    last_turn = "last_turn"


OBJECTIVE_NAME = re.compile(r"[a-z][a-z0-9_]*")  # a module, so that a config can import nothing else


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is learned."""

    kind: str = "sft"  # the objective: a file of train/objective/, such as sft (next tokens of what the assistant says)
    targets: Targets = Targets.all_turns  # every assistant turn of a conversation, or only its last
    settings: dict[str, Any] = field(default_factory=dict)  # the objective's own settings, which its file checks

    def __post_init__(self) -> None:
        if not OBJECTIVE_NAME.fullmatch(self.kind):
            raise ConfigError(
                f"{self.kind!r} cannot name an objective.",
                key="objective.kind",
                do="write the name of a file of train/objective/, such as sft.",
            )
