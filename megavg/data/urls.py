"""Open what webdataset opens beside files, ``pipe:COMMAND`` and ``http(s)://`` above all, and notice how it ended.

``pipe:`` hands its text to the shell of every process that reads the shards: whoever may write the configuration may
run commands. Do not take shard lists from people you would not give a shell.
"""

from __future__ import annotations

import re
import subprocess

from megavg.data.sample import SampleError
from megavg.protocols.life import goes_on

ATTEMPTS = 4
RETRY_SECONDS = 1.0  # before the second attempt; it doubles with each further one
_END_SECONDS = 60.0

_CURL = {3: "not a proper URL", 6: "host not found", 7: "could not connect", 18: "connection cut", 22: "the server "
         "answered with an error, such as 404", 28: "timed out", 35: "TLS failed", 52: "empty answer",
         56: "connection broken", 60: "certificate not trusted"}
_SHELL = {126: "command cannot be run", 127: "command not found"}
_FINAL = {3, 22, 60}  # of curl, which has repeated what may pass by itself; a shell's are final too


class TransportError(SampleError):
    """A shard could not be fetched to its end. It always stops the run, also with ``on_error="skip"``.

    A broken connection is no property of the data: the other ranks, and this one after a restart, would see another
    order of samples if one of them went on without the shard. ``retry`` is False where another attempt is of no use.
    """

    def __init__(self, url: str, detail: str, retry: bool = True):
        super().__init__(url, "", "torn shard", detail)
        self.retry = retry

    def __reduce__(self):
        return type(self), (self.shard, self.detail, self.retry)


def is_url(pattern: str) -> bool:
    """True for ``pipe:COMMAND`` and ``scheme://...``, False for a path."""
    return pattern.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", pattern) is not None


class UrlStream:
    """The bytes of ``url`` as ``webdataset.gopen`` delivers them, with an end that can be trusted.

    Raises:
        TransportError: the program that fetches cannot be started.
    """

    def __init__(self, url: str):
        from webdataset.gopen import gopen  # late: webdataset brings torch with it

        self.url, self._ended = url, False
        try:
            opened = gopen(url, "rb", bufsize=1 << 20)
        except (OSError, ValueError) as error:
            raise TransportError(url, f"it cannot be opened ({error}); check the URL and that the program that "
                                 "fetches it is installed", retry=False) from error
        # Its read() raises as soon as the program has failed and drops what was read: the end would be left to chance.
        self._process: subprocess.Popen | None = getattr(opened, "proc", None)
        self._file = opened.stream if self._process else opened
        self._opened = opened  # it would close the stream when nobody refers to it

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end.

        Raises:
            TransportError: the program ended with a status other than 0.
        """
        data = self._file.read(size)
        goes_on()
        if len(data) < size:
            self._check_status()
        return data

    def finish(self) -> None:
        """Read what is left and check the status: a checksum of the whole is only found wrong at the end."""
        while not self._ended:
            self.read(1 << 20)

    def _check_status(self) -> None:
        self._ended = True
        if self._process is None:
            return
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TransportError(self.url, f"its program did not end within {_END_SECONDS:.0f} s after its output "
                                 "had ended") from error
        if status:
            raise TransportError(self.url, *_explain(status, self.url.startswith("pipe:")))

    def close(self) -> None:
        """Stop the program if it still runs, and wait for it."""
        self._file.close()  # the program gets SIGPIPE at its next output
        if self._process is None:
            return
        try:
            self._process.wait(0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _explain(status: int, shell: bool) -> tuple[str, bool]:
    """Words for an exit status, and whether another attempt may help."""
    if status < 0:
        return f"its program was ended by signal {-status}", True
    meaning = (_SHELL if shell else _CURL).get(status)
    how = f"its {'command' if shell else 'program'} ended with exit status {status}"
    return (f"{how} ({meaning})" if meaning else how) + "; try it by hand", status not in (_SHELL if shell else _FINAL)
