"""What the tests share. They run in two processes (see pytest.ini), each with one thread: two
processes that compute with two threads each on two cores take ten times as long."""
import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
os.environ["OMP_NUM_THREADS"] = "1"  # also for the commands that tests run; before torch starts
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.nn", "torch.utils.tensorboard", "pyarrow.compute",
                              "pyarrow.parquet", "safetensors.torch"])  # torch's optimizers import _dynamo
# a shell starts jobs in the background with Ctrl-C ignored, which the commands would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest first, so that both processes end at about the same time."""
    first = ["test_train.py", "test_road.py", "test_dpo.py", "test_tokenizer.py", "test_data.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else 9)


def run_script(name: str, *args, stdin: str = "") -> subprocess.CompletedProcess:
    """What `python NAME ARGS` does, in this process, where torch is loaded already: that saves two
    to three seconds. test_road.py starts real commands."""
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


class Script:
    """What `python PATH ARGS` does, in a process of its own, which begins as a copy of one that has
    loaded torch: that saves three to four seconds. The methods are those of subprocess.Popen."""

    def __init__(self, path: str | Path, *args, cwd: str | Path = ".", **env):
        """path: of the script, from the repository's folder, or "torchrun"; env: more environment variables."""
        self.args = [str(path if path == "torchrun" else ROOT / path), *map(str, args)]
        self.folder = tempfile.TemporaryDirectory()
        self.process = FORKS.Process(target=run_as_main, args=(self.args, str(cwd), env, self.folder.name))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 100) -> int:
        self.process.join(timeout)
        ended = self.process.exitcode is not None
        self.kill()
        self.process.join()
        assert ended, self.args
        return self.process.exitcode

    def completed(self) -> subprocess.CompletedProcess:
        """Wait for the end; with what was printed."""
        code = self.wait()
        said = [Path(self.folder.name, name).read_text("utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.args, code, *said)


def run_as_main(argv: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    """In the new process: run argv[0], a script or torchrun, in the folder cwd. What it prints goes to files in `folder`."""
    os.chdir(cwd)
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.argv = argv
    try:
        if argv[0] == "torchrun":
            runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    finally:  # end pools of processes first, as Python does; multiprocessing ends them in another order, and may wait forever
        threading._shutdown()


def start_ranks(path: str | Path, *args_of_ranks: list[str], **env) -> list[Script]:
    """Start the ranks of one run, one list of arguments each, as on machines of their own."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(args_of_ranks))}
    return [Script(path, *args, RANK=str(rank), LOCAL_RANK=str(rank if "LOCAL_WORLD_SIZE" in env else 0), **env)
            for rank, args in enumerate(args_of_ranks)]


def run_ranks(path: str | Path, *args, ranks: int) -> subprocess.CompletedProcess:
    """What `torchrun --nproc_per_node=RANKS PATH ARGS` does, without its own process and its second
    attempts. The exit status is that of the failed rank with the lowest number."""
    scripts = start_ranks(path, *[list(args)] * ranks, LOCAL_WORLD_SIZE=str(ranks))
    try:
        ends = [script.completed() for script in scripts]
    finally:
        for script in scripts:
            script.kill()
    code = next((end.returncode for end in ends if end.returncode), 0)
    return subprocess.CompletedProcess(ends[0].args, code, "".join(end.stdout for end in ends), "".join(end.stderr for end in ends))
