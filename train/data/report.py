"""What became of the data, for the start-up lines and summary.json."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class SplitReport:
    """Counts of one split. A record is what is trained on: a row, or one of its turns where it had to be expanded."""

    num_rows: int  # read
    num_records: int  # kept
    num_expanded: int  # rows rendered once for each turn: a later turn changes the tokens of an earlier one
    num_dropped: int  # records longer than sequence_length, left out
    num_truncated: int  # records that lost the left of their prompt
    num_straddling: int  # records whose tokens had to be cut where an answer starts (docs/data.md)
    num_tokens: int
    num_target_tokens: int
    num_sequences: int
    sequence_length: int
    longest: int  # tokens of the longest record
    fill: float  # fraction of the positions that hold a token

    def line(self) -> str:
        """One line for people; what is unusual is named only when it happened."""
        unusual = {
            "dropped as too long": self.num_dropped,
            "truncated": self.num_truncated,
            "rows expanded turn by turn": self.num_expanded,
            "cut where an answer starts": self.num_straddling,
        }
        notes = "".join(f", {count:,} {what}" for what, count in unusual.items() if count)
        return (
            f"{self.num_records:,} records{notes}; {self.num_tokens:,} tokens, {self.num_target_tokens:,} targets; "
            f"{self.num_sequences:,} sequences of {self.sequence_length:,}, {self.fill:.1%} full"
        )


@dataclass(kw_only=True)
class DataReport:
    """Counts of the data of a run."""

    train: SplitReport
    validation: SplitReport | None
    num_leaked: int  # validation questions that are training questions too, word for word

    def lines(self) -> list[str]:
        """For printing at the start."""
        lines = [f"train: {self.train.line()}"]
        if self.validation is not None:
            lines.append(f"validation: {self.validation.line()}")
        if self.num_leaked:
            lines.append(f"warning: {self.num_leaked:,} validation questions are training questions too, word for word")
        return lines

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        validation = values["validation"]
        return cls(
            train=SplitReport(**values["train"]),
            validation=SplitReport(**validation) if validation else None,
            num_leaked=values["num_leaked"],
        )
