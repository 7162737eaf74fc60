"""`python -m dsv2cli` is `dsv2`: from the first moment on, Ctrl-C ends it without a traceback."""

import os
import signal
import sys
from types import FrameType


def start() -> None:
    """The entry point: cli/app.py's, with Ctrl-C obeyed at once while that is imported."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    from dsv2cli.cli.app import main

    signal.signal(signal.SIGINT, before)
    try:
        main()
    except KeyboardInterrupt:  # in the last moment
        sys.exit(128 + signal.SIGINT)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter ends, and would show where


if __name__ == "__main__":
    start()
