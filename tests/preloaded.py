"""A Python for tests that starts in a fraction of the time: a server that has imported PyTorch forks for each command.

    subprocess.run([preloaded_python(), "train.py", "config/quickstart.py"])        # in the place of sys.executable

What runs is a process of its own, with the caller's arguments, environment, folder, stdin, stdout and stderr. It differs
from a fresh Python in that PyTorch and other packages (none of this project's modules) are imported already; a test that
looks at what is imported, at how long that takes, or at process groups, starts a fresh one.

The executable is a small client: it hands all of that to the server over a socket, passes on the signals that it gets,
and ends as the command does. If it is killed, the server kills the command.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

CLIENT = """#!{python} -IS
import fcntl, json, os, signal, socket, sys
files = [number for number, file in enumerate((sys.stdin, sys.stdout, sys.stderr)) if file is not None]
server = socket.socket(socket.AF_UNIX)
server = socket.socket(fileno=fcntl.fcntl(server.detach(), fcntl.F_DUPFD, 3))  # not in the place of a closed one
server.connect({address!r})
order = dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ), files=files)
order = json.dumps(order).encode()
socket.send_fds(server, [len(order).to_bytes(8, "big")], files)
server.sendall(order)
for number in {passed_on}:
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
code = int(server.recv(100) or b"1")
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def preloaded_python() -> str:
    """The executable. Its server is started once a session and ends with it. Where there is no /proc, a fresh Python."""
    if not sys.platform.startswith("linux"):
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="preloaded_")
    address, client = str(Path(folder.name) / "socket"), Path(folder.name) / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address, passed_on=tuple(map(int, PASSED_ON))))
    client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(client)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process with threads must not fork
        start_new_session=True,
    )
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.stdin.close()  # which the server takes for the end of the session, however it comes
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return str(client)


# ------------------------------------------------------------------------------------------- the server


class Server:
    """Forks a process for each client, and tells it how the process ended."""

    def __init__(self, address: str):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(100)
        self.ended, ended = os.pipe()
        os.set_blocking(self.ended, False)
        os.set_blocking(ended, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ended)
        self.clients: dict[int, socket.socket] = {}  # process → who waits for it
        self.selector = selectors.DefaultSelector()
        for source in (self.listener, self.ended, 0):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> tuple[dict, list[int]] | None:
        """Returns None at the end of the session; in a forked process, what it is to do, and its stdin, stdout, stderr."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    return self.kill()
                if key.fileobj == self.ended:
                    self.tell()
                elif key.fileobj is self.listener:
                    if (order := self.start()) is not None:
                        return order
                elif key.data in self.clients:
                    self.listen(key.data)

    def start(self) -> tuple[dict, list[int]] | None:
        """Take an order and fork; only in the forked process it is returned."""
        client, _ = self.listener.accept()
        size, files, _, _ = socket.recv_fds(client, 8, 3)
        with client.makefile("rb") as message:
            order = json.loads(message.read(int.from_bytes(size, "big")))
        if (pid := os.fork()) == 0:
            for open_here in (client, self.listener, self.selector, *self.clients.values()):
                open_here.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            return order, files
        for file in files:
            os.close(file)
        self.clients[pid] = client
        self.selector.register(client, selectors.EVENT_READ, pid)
        return None

    def listen(self, pid: int) -> None:
        """Pass on the signals that a client got; without the client its process is killed."""
        try:
            numbers = self.clients[pid].recv(100)
        except ConnectionError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:
            self.selector.unregister(self.clients[pid])

    def tell(self) -> None:
        """Tell the clients of processes that have ended how they did."""
        os.read(self.ended, 1000)
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            client = self.clients.pop(pid)
            if client in self.selector.get_map():
                self.selector.unregister(client)
            try:
                client.send(str(os.waitstatus_to_exitcode(status)).encode())
            except OSError:
                pass  # it was killed
            client.close()

    def kill(self) -> None:
        """End what still runs."""
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)


def become(order: dict, files: list[int], executable: str) -> None:
    """Run the command in this process as Python would: a script, -m a module, or -c a text."""
    for number in range(3):
        if number in order["files"]:
            os.dup2(files[order["files"].index(number)], number)
        else:
            os.close(number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.executable = executable
    what, *arguments = order["arguments"]
    at_once = what == "-u"  # torchrun starts its processes so
    if at_once:
        what, *arguments = arguments
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdin = sys.stdout = sys.stderr = None
    if 0 in order["files"]:
        sys.stdin = open(0, encoding=encoding, errors=errors or "strict", closefd=False)
    if 1 in order["files"]:
        sys.stdout = open(1, "w", 1 if os.isatty(1) else -1, encoding, errors or "strict", closefd=False)
        sys.stdout.reconfigure(write_through=at_once)
    if 2 in order["files"]:
        sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)
    sys.path[:1] = [*os.environ.get("PYTHONPATH", "").split(os.pathsep)] if os.environ.get("PYTHONPATH") else []
    if what == "-c":
        text, *arguments = arguments
        sys.argv[:] = ["-c", *arguments]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), main.__dict__)
    elif what == "-m":
        module, *arguments = arguments
        sys.argv[:] = [module, *arguments]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [what, *arguments]
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


def finish(command: Callable[[], None]) -> None:
    """Run it and end the process as Python does, but for taking all of PyTorch apart, which would take a second."""
    code: object = 0
    try:
        command()
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored while flushing sys.stdout:\n{error!r}", file=sys.stderr)
        code = 120
    if (code or 0) < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit((code or 0) & 255)


def main(address: str, executable: str) -> None:
    import torch._dynamo
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.profiler
    import torch.utils.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.freeze()  # its objects are not visited, and so not copied, in the forked processes
    server = Server(address)
    print("ready", flush=True)
    if order := server.serve():
        finish(lambda: become(*order, executable))


if __name__ == "__main__":
    main(*sys.argv[1:])
