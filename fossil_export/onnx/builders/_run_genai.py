"""Start ONNX Runtime GenAI's model builder; run as a script, by its path, in a process of its own.

`python -m` would put the current folder before everything that is installed, and a torch.py there would run. A
script has its own folder there instead, which goes before anything is imported (Python 3.10 has no `-P`).
"""

import sys


def main() -> None:
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    _live_with_parent(int(sys.argv.pop(1)))
    # A config can name attention by a repository of the Hub, which this package would fetch and run.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    import runpy

    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


def _live_with_parent(lifeline: int) -> None:
    """End when the process that started this one ends, and by its word alone: a terminal's Ctrl-C reaches both."""
    import _thread
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        os.read(lifeline, 1)  # nothing is ever written there
        os._exit(1)

    _thread.start_new_thread(watch, ())


if __name__ == "__main__":
    main()
