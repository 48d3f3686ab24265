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


def test_models_share_a_thread_unless_they_work_at_the_same_time() -> None:
    first, second = Cancel(), Cancel()
    assert first.call(threading.get_ident) == second.call(threading.get_ident)
    both = threading.Barrier(2)

    def meet() -> int:
        both.wait(10)
        return threading.get_ident()

    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(second.call(meet)))
    other.start()
    found.append(first.call(meet))
    other.join()
    assert len({*found, threading.get_ident()}) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    cancel = Cancel()
    cancel.call(int, "1")
    child = os.fork()
    if child == 0:
        os._exit(cancel.call(int, "3"))
    give_up_s = time.monotonic() + 30
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > give_up_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 3


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


def test_nothing_begins_after_cancel_until_the_next_call_begins() -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        cancel.call(pytest.fail, "it ran")
    cancel.begin()
    assert cancel.call(int, "3") == 3


def test_cancel_reaches_a_stage_that_has_a_switch_of_its_own() -> None:
    cancel = Cancel()
    switched: list[bool] = []
    cancel.stops_with(lambda: switched.append(True))
    cancel.cancel()
    cancel.stops_with(None)
    cancel.cancel()
    assert switched == [True]
