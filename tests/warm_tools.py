"""A process that has imported what takes long, and forks for each command or snippet: the pages run many of them.

What a command prints, reads, writes and ends with is that of a process of its own. How fast it starts, and what it
imports by itself, is tested where it starts cold (test_cli.py, test_without_transformers.py, test_gpu_start.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({address!r})
    call = json.dumps([{kind!r}, sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(warm, [len(call).to_bytes(8, "big")], [0, 1, 2])
    warm.sendall(call)
    end = warm.recv(8)
os._exit(int(end) if end else 1)
"""

SERVER = """
import contextlib, json, os, select, socket, sys
import torch, peft, transformers, transformers.models.llama.modeling_llama, transformers.generation.utils

def called():
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, 0], [], [])[0]:  # until the tests end, and with them the pipe
            caller, _ = server.accept()
            if os.fork():
                caller.close()
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:  # those that ended
                        pass
                continue
            server.close()
            with caller:
                size, given, *_ = socket.recv_fds(caller, 8, 3)
                with caller.makefile("rb") as stream:
                    call = json.loads(stream.read(int.from_bytes(size, "big")))
                command = os.fork()
                if command:
                    _, status = os.waitpid(command, 0)
                    caller.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
                    os._exit(0)
            for number, one in enumerate(given):
                os.dup2(one, number)
                os.close(one)
            return call
    os._exit(0)

kind, arguments, folder, variables = called()
sys.stdin = sys.__stdin__ = open(0, closefd=False)
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
os.chdir(folder)
os.environ.clear()
os.environ.update(variables)
code = "from fossil_export._start import main; main()"
sys.argv = arguments
if kind == "python":
    code, sys.argv = arguments[2], ["-c", *arguments[3:]]
exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
"""


@contextmanager
def warm(variables: Mapping[str, str]) -> Iterator[Path]:
    """A folder for the front of PATH, in which `fossil-export` and `python-c` are forks of one process.

    `python-c` runs its argument as `python -c` does. The process is started with `variables`, as libraries read
    theirs when they are imported.
    """
    with tempfile.TemporaryDirectory() as name:  # a socket's path must be short
        folder, address = Path(name), f"{name}/socket"
        for program, kind in (("fossil-export", "command"), ("python-c", "python")):
            (folder / program).write_text(CLIENT.format(python=sys.executable, address=address, kind=kind))
            (folder / program).chmod(0o755)
        start = [sys.executable, "-c", SERVER, address]
        pipe = subprocess.PIPE
        with subprocess.Popen(start, cwd=folder, env=dict(variables), stdin=pipe, stdout=pipe) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == b"ready\n"
                yield folder
            finally:
                server.kill()
