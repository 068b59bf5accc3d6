"""Start ONNX Runtime GenAI's model builder; run as a script, by its path, in a process of its own.

`python -m` would put the current folder before everything that is installed, and a torch.py there would run. A
script has its own folder there instead, which goes before anything is imported (Python 3.10 has no `-P`).
"""

import sys


def main() -> None:
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    # A config can name attention by a repository of the Hub, which this package would fetch and run.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    import runpy

    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
