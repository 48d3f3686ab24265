"""Native calls end when they are told to."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from edgevlm.cancel import Cancel
from edgevlm.errors import Cancelled


def test_a_call_gives_its_result() -> None:
    cancel = Cancel()
    assert cancel.call(divmod, 7, 2) == (3, 1)
    cancel.close()


def test_ctrl_c_sets_the_flag_and_waits_until_the_work_has_ended() -> None:
    cancel = Cancel()
    ended = threading.Event()

    def native() -> None:  # polls as kernels and llama.cpp do
        while not cancel.flag.is_set():
            time.sleep(0.001)
        time.sleep(0.05)
        ended.set()

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        cancel.call(native)
    assert ended.is_set()
    cancel.close()


def test_nothing_begins_after_cancel_until_the_next_call_begins() -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        cancel.call(pytest.fail, "it ran")
    cancel.begin()
    assert cancel.call(int, "3") == 3
    cancel.close()


def test_cancel_reaches_a_stage_that_has_a_switch_of_its_own() -> None:
    cancel = Cancel()
    switched: list[bool] = []
    cancel.stops_with(lambda: switched.append(True))
    cancel.cancel()
    cancel.stops_with(None)
    cancel.cancel()
    assert switched == [True]
    cancel.close()
