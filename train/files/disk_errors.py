"""What to do about a file that could not be written, by the system's own word for what went wrong."""

import errno
import os

_REMEDIES = {
    (errno.ENOSPC,): "free space there",
    (errno.EDQUOT,): "free space there, or ask for a larger quota",
    (errno.EACCES, errno.EPERM): "let the user of the run write there (owner, mode, lsattr), or choose another folder",
    (errno.EROFS,): "mount that file system for writing, or choose another folder",
    (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ENOTCONN, errno.ETIMEDOUT):
        "look at that disk, its mount or its server (dmesg): it does not answer as it should",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files (ulimit -n)",
    (errno.EFBIG,): "raise the limit of a file's size (ulimit -f), or choose another file system",
    (errno.ENAMETOOLONG,): "choose a folder with a shorter name",
    (errno.ENOMEM,): "free memory on that machine",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        "keep other programs out of that folder",
}  # fmt: skip
_BY_WORDS = {os.strerror(number): do for numbers, do in _REMEDIES.items() for number in numbers}


def reason_of(error: BaseException) -> str:
    """An error in one line without a full stop."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def remedy(problem: str, otherwise: str) -> str:
    """What to do about a problem, in which the system's word stands: safetensors and tokenizers raise no OSError.

    otherwise: what to do where the disk is not to blame.
    """
    return next((do for words, do in _BY_WORDS.items() if words in problem), otherwise)
