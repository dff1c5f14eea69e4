"""Standard output that may break: the disk behind it is full, the reader of the pipe has gone. Training goes on."""

import contextlib
import logging
import os
import sys
from typing import IO, Any, cast


def unfailing_stream(name: str) -> IO[str]:
    """The stream of this name, `stdout` or `stderr`, that never raises."""
    return cast(IO[str], UnfailingStream(name))


class UnfailingStream:
    """sys.stdout or sys.stderr as it is at each moment; after its first failure what is written is dropped."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Python tries again at its end what it could not write, and would end with code 120."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        logging.raiseExceptions = False  # log lines to the same place would each print a traceback
        if self._name == "stdout":
            with contextlib.suppress(OSError):
                os.write(2, f"warning: stdout cannot be written ({error}); training goes on without it.\n".encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
