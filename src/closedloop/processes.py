"""Processes that end with the one that started them, whether it is told to end, is killed, or fails."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PARENT_SECONDS = 0.5
STARTER_VARIABLE = "CLOSEDLOOP_STARTED_BY"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command; on Linux the kernel sends it SIGTERM when this process ends, however it ends.

    On other systems only our own commands notice that, by `end_with_parent`. Call it from a thread that lives as long
    as the process should: the kernel counts the thread as the parent.

    Parameters
    ----------
    options
        As `subprocess.Popen` takes them.
    """
    return subprocess.Popen(command, preexec_fn=_prepare_end(os.getpid()), **options)


def run_process(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Like `subprocess.run`, of a command that on Linux ends when this process ends, however it ends."""
    return subprocess.run(command, preexec_fn=_prepare_end(os.getpid()), **options)


@contextlib.contextmanager
def open_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that end with this one, however it ends, and leave their work where the block fails."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import active_children

    pool = ProcessPoolExecutor(count, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # `SystemExit` would be the result of a task
    end_with_parent(parent)


def end_process(process: subprocess.Popen[bytes], seconds: float = 20.0) -> bool:
    """Send SIGTERM, wait, and kill what has not ended by then; returns whether that was not needed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def exit_on_signals(status: int | None = None) -> None:
    """Turn SIGTERM, SIGINT and SIGHUP into `SystemExit`, so that `finally` blocks end what was started.

    SIGHUP becomes SIGTERM, for whatever handles that by then; under `nohup` it stays ignored. The exit status is 128
    plus the number of the signal, unless one is given. The end of a starter, such as make, counts as SIGTERM.
    """
    handle_end_signals(lambda number: sys.exit(128 + number if status is None else status))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    _exit_from_hooks()
    end_with_starter()


def _exit_from_hooks() -> None:
    """Send SIGTERM again where Python swallows the `SystemExit` of a signal: in hooks of a fork and in destructors."""
    before = sys.unraisablehook

    def hook(swallowed: Any) -> None:
        if isinstance(swallowed.exc_value, SystemExit):
            # from another thread, a moment later: what is raised in this function is swallowed too
            threading.Timer(PARENT_SECONDS / 10, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            before(swallowed)

    sys.unraisablehook = hook


def handle_end_signals(handle: Callable[[int], object]) -> None:
    """Call ``handle`` with the number of each signal that asks this process to end, but for a SIGHUP under `nohup`."""
    for number in END_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda found, _: handle(found))


def end_with_parent(parent: int) -> None:
    """Send this process SIGTERM once the process ``parent`` is its parent no more."""
    _end_once(lambda: os.getppid() != parent)


@contextlib.contextmanager
def name_starter() -> Iterator[None]:
    """Let those of our commands that a tool starts within the block end with this process, by `end_with_starter`.

    DVC and KFP start them through a shell, so that this process is not their parent. The Makefile names make.
    """
    before = os.environ.get(STARTER_VARIABLE)
    os.environ[STARTER_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(STARTER_VARIABLE)
        if before is not None:
            os.environ[STARTER_VARIABLE] = before


def end_with_starter() -> None:
    """Send this process SIGTERM once the process that `name_starter` named has ended."""
    named = os.environ.get(STARTER_VARIABLE, "")
    if named.isdecimal() and int(named) != os.getpid():
        del os.environ[STARTER_VARIABLE]
        _end_once(_watch(int(named)))


def _watch(process: int) -> Callable[[], bool]:
    """A function that tells whether a process has ended, even if its parent has not waited for it yet."""
    try:
        poll = select.poll()
        poll.register(os.pidfd_open(process), select.POLLIN)
    except (AttributeError, OSError):  # not Linux, or the process is gone
        return lambda: not _is_running(process)
    return lambda: bool(poll.poll(0))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing: it asks whether the process is there
    except ProcessLookupError:
        return False
    return True


def _end_once(is_over: Callable[[], bool]) -> None:
    def watch() -> None:
        while not is_over():
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _prepare_end(parent: int) -> Callable[[], None] | None:
    """The function that a new process, a copy of one of our threads, calls before its command; it may call little."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        for number in END_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # our handlers would note a signal that comes before the command starts, which then loses it
                signal.signal(number, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was told
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


@contextlib.contextmanager
def to_standard_error() -> Iterator[None]:
    """Send to standard error what this process and its children write to standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
