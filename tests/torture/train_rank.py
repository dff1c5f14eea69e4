"""A rank of a torture test's run: launch/train.py's own main(), with less room than it wants where a test says so."""

import resource
import signal
import sys


def train(overrides: list[str], file_bytes: int = 0, memory_bytes: int = 0) -> None:
    if file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond it then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes,) * 2)
    sys.argv = ["launch/train.py", *overrides]
    from tunesmith.launch.arguments import main
    from tunesmith.launch.train import train

    main(train)
