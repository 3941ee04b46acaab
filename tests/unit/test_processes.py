"""Who starts a process ends it: by a signal, by an error, and even when it is killed itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from closedloop.processes import end_process

SLEEP = "import time; print('there', flush=True); time.sleep(1000)"


def run_python(code, **options):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def wait_for_end(pid):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it still runs")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells of a parent's end on Linux alone")
def test_what_was_started_ends_when_its_parent_is_killed():
    parent = run_python(f"""
        import subprocess, sys, time
        from closedloop.processes import start_process
        child = start_process([sys.executable, "-c", {SLEEP!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(1000)
    """)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_for_end(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_command_behind_a_shell_ends_with_the_process_that_a_tool_started_it_for(number):
    waiting = "from closedloop.processes import end_with_starter; end_with_starter(); import os, time;"
    waiting += "print(os.getpid(), flush=True); time.sleep(1000)"
    parent = run_python(f"""
        import subprocess, sys
        from closedloop.processes import name_starter
        with name_starter():
            subprocess.run(["sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", {waiting!r}])
    """)
    child = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.wait()
    wait_for_end(child)
    parent.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_pool_ends_in_the_middle_of_its_work_with_the_process_that_has_it(number):
    parent = run_python("""
        import os, time
        from closedloop.processes import exit_on_signals, open_pool
        exit_on_signals()
        with open_pool(1) as pool:
            worker = pool.submit(os.getpid).result()
            work = pool.submit(time.sleep, 1000)
            while not work.running():
                time.sleep(0.01)
            print(worker, flush=True)
            work.result()
    """)
    worker = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.wait(60)
    wait_for_end(worker)
    parent.stdout.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell it once the parent has waited")
def test_a_starter_that_nobody_has_waited_for_yet_has_ended_all_the_same():
    waiting = "from closedloop.processes import end_with_starter; end_with_starter(); " + SLEEP
    starter = run_python(f"""
        import subprocess, sys, time
        from closedloop.processes import name_starter
        with name_starter():
            child = subprocess.Popen([sys.executable, "-c", {waiting!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(1000)
    """)
    child = int(starter.stdout.readline())
    starter.kill()
    wait_for_end(child)
    starter.communicate()


def test_tests_name_themselves_the_starter_of_what_they_start():
    code = "import os; print(os.environ['CLOSEDLOOP_STARTED_BY'])"
    assert run_python(code).communicate()[0] == f"{os.getpid()}\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="start_process prepares a process on Linux alone")
def test_a_signal_that_comes_before_the_command_starts_ends_it():
    """Our own handlers would only note it, and the command that takes the process's place knows nothing of that."""
    process = run_python("""
        import os, signal, sys
        from closedloop import processes
        processes.exit_on_signals()
        prepare = processes._prepare_end(os.getpid())
        child = os.fork()
        if child == 0:
            prepare()
            os.kill(os.getpid(), signal.SIGTERM); os.execv("/bin/true", ["true"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert process.communicate()[0] == f"{-signal.SIGTERM}\n"


def test_a_process_of_ours_notices_its_parents_end_on_any_system():
    waiting = "import os, time; from closedloop.processes import end_with_parent; end_with_parent(os.getppid());"
    parent = run_python(f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {waiting + SLEEP!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        time.sleep(1000)
    """)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_for_end(child)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)], ids=str
)
def test_a_signal_to_end_lets_finally_blocks_run(number, status):
    process = run_python("""
        import time
        from closedloop.processes import exit_on_signals
        exit_on_signals()
        try:
            print("there", flush=True)
            time.sleep(1000)
        finally:
            print("tidied up", flush=True)
    """)
    assert process.stdout.readline() == "there\n"
    process.send_signal(number)
    assert process.communicate()[0] == "tidied up\n"
    assert process.returncode == status


def test_a_signal_that_comes_while_a_process_is_started_is_not_swallowed():
    """Python ignores what is raised in the hooks of a fork, where a signal of that time is handled."""
    process = run_python("""
        import os, signal, sys, time
        from closedloop.processes import exit_on_signals, start_process
        exit_on_signals()
        try:
            os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))
            child = start_process([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=-3)
            time.sleep(1000)
        finally:
            print("tidied up", flush=True)
    """)
    try:
        assert process.communicate(timeout=60)[0] == "tidied up\n"
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM


def test_under_nohup_the_end_of_the_terminal_ends_nothing():
    process = run_python(
        """
        import signal
        from closedloop.processes import exit_on_signals
        exit_on_signals()
        signal.raise_signal(signal.SIGHUP)
        print("goes on")
        """,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.communicate()[0] == "goes on\n"


def test_what_does_not_end_when_told_to_is_killed():
    process = run_python(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    assert process.stdout.readline() == "there\n"
    end_process(process, 0.1)
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


ROOT = Path(__file__).parents[2]
# cluster.py plays a cluster, whose Jobs outlive who asks for them; proof.py ends its process by a deadline of its own;
# the last two try processes' ends
OTHERS = {
    "src/closedloop/processes.py",
    "src/closedloop/serving/slots/proof.py",
    "tests/cluster.py",
    "tests/e2e/test_ends.py",
    "tests/unit/test_processes.py",
}
BRIEF = {"src/closedloop/adapters/git.py"}  # it waits for git's answers, of milliseconds


def find_files(word, *patterns):
    return {
        str(path.relative_to(ROOT))
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if word in path.read_text(encoding="utf-8")
    }


def test_nothing_is_started_that_would_outlive_what_starts_it():
    everywhere = ("src/**/*.py", "benchmarks/**/*.py", "tests/**/*.py")
    assert find_files("subprocess.Popen(", *everywhere) == OTHERS
    assert find_files("ProcessPoolExecutor(", *everywhere) == {
        "src/closedloop/processes.py",
        "tests/unit/test_processes.py",
    }
    # what is waited for goes on when its waiter is killed; commands of ours that a test waits for end with the test
    assert find_files("subprocess.run(", *everywhere[:2]) == BRIEF | {"src/closedloop/processes.py"}


def test_every_program_beside_the_package_ends_on_signals():
    programs = find_files('if __name__ == "__main__":', "benchmarks/*.py", "tests/soak/*.py")
    assert programs == find_files("exit_on_signals()", "benchmarks/*.py", "tests/soak/*.py")
    assert len(programs) > 10
    assert not find_files("SystemExit):", "benchmarks/**/*.py", "tests/soak/*.py")  # the signal's own would be caught
