"""What a rank may be doing, in the words that a person reads, and which timeout holds for it."""

from enum import IntEnum, StrEnum


class TimeoutKind(IntEnum):
    """Which of a config's timeouts holds (watch/timeouts.py)."""

    start = 0
    step = 1
    save = 2


class Phase(StrEnum):
    """One thing a rank may be doing."""

    kind: TimeoutKind

    def __new__(cls, words: str, kind: TimeoutKind) -> "Phase":
        phase = str.__new__(cls, words)
        phase._value_ = words
        phase.kind = kind
        return phase

    starting = "starting", TimeoutKind.start
    preparing_data = "preparing the data", TimeoutKind.start
    meeting_ranks = "meeting the other ranks", TimeoutKind.start
    checking_nodes = "checking the nodes", TimeoutKind.start
    checking_engine = "checking the engine", TimeoutKind.start
    finding_checkpoint = "looking for a checkpoint", TimeoutKind.start
    loading_model = "loading the model", TimeoutKind.start
    timing_kernels = "timing kernels", TimeoutKind.start
    making_engine = "making the engine", TimeoutKind.start
    converting = "converting the checkpoint", TimeoutKind.start
    resuming = "resuming from the checkpoint", TimeoutKind.start
    rolling_back = "rolling back", TimeoutKind.start

    reading_data = "reading data", TimeoutKind.step
    meeting_at_step = "meeting at a step", TimeoutKind.step
    forward = "forward", TimeoutKind.step
    backward = "backward", TimeoutKind.step
    update = "update", TimeoutKind.step
    reporting = "reporting", TimeoutKind.step
    evaluating = "evaluating", TimeoutKind.step
    generating = "generating answers", TimeoutKind.step
    finishing = "finishing", TimeoutKind.step

    saving = "saving", TimeoutKind.save
    writing_model = "writing the model", TimeoutKind.save
    opening_model = "opening the saved model again", TimeoutKind.save
    restoring_best = "bringing back the best weights", TimeoutKind.save
