"""What the tests share. They run in two processes (see pytest.ini), each with one thread: two
processes that compute with two threads each on two cores take ten times as long."""
import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # also for the commands that tests run; before torch starts
# a shell starts jobs in the background with Ctrl-C ignored, which the commands would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest first, so that both processes end at about the same time."""
    first = ["test_train.py", "test_road.py", "test_dpo.py", "test_tokenizer.py", "test_data.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else 9)


def run_script(name: str, *args, stdin: str = "") -> subprocess.CompletedProcess:
    """What `python NAME ARGS` does, in this process, where torch is loaded already: that saves two
    to three seconds. test_road.py and the tests of several processes start real commands."""
    main, data = importlib.import_module(name.removesuffix(".py")).main, importlib.import_module("data")
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    data.note_once.cache_clear()
    argv = [name, *map(str, args)]
    with (mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(stdin)),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            data.run(main)
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
