"""ONNX folders as something that gives logits for tokens, on ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fossil_export._extras import required
from fossil_export._spellings import device_missing
from fossil_export._threads import threads
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import FossilExportError, OnnxError
from fossil_export.onnx._adapter_file import ADAPTER
from fossil_export.onnx._signature import read_mark, read_outlets
from fossil_export.onnx.builders._existing import find_graph
from fossil_export.onnx.graph._file import external_files, load_graph
from fossil_export.verifying._models import Tokens
from fossil_export.writing._scratch import scratch_folder

if TYPE_CHECKING:
    import torch

    Array = np.ndarray[Any, Any]

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class OnnxRunner:
    """A graph in a session of ONNX Runtime, with the adapter file beside it active if it takes one.

    Language models with a key-value cache among their inputs start from an empty one. `exact` computes the products
    that the graph asks for in 8 bits in full precision: the graph is changed in memory.
    """

    def __init__(self, folder: Path, device: str, exact: bool = False) -> None:
        self._ort = required("onnxruntime")
        self._graph = find_graph(folder)
        self._providers = providers(device)
        self._model = load_graph(self._graph)
        self._sizes = _sizes(folder)
        self._session = self._open_exact() if exact else self._open(self._graph)
        self._adapter = None
        if (folder / ADAPTER).is_file() and "signature" in read_mark(self._graph, self._model):
            self._adapter = self._ort.LoraAdapter()
            try:
                self._adapter.Load(str(folder / ADAPTER))
            except Exception as problem:  # ONNX Runtime's own classes
                raise OnnxError(f"{folder / ADAPTER}: cannot be loaded: {_line(problem)}; export it again") from problem
        self.active = self._adapter is not None

    @property
    def swaps(self) -> bool:
        """Whether the graph has an adapter file whose use can be switched by setting `active`."""
        return self._adapter is not None

    def logits(self, tokens: Tokens) -> torch.Tensor:
        import torch

        found = self._run([self._output()], self._feeds(tokens))[0]
        return torch.from_numpy(np.asarray(found[0], np.float64))

    def generate(self, tokens: Tokens, count: int) -> Tokens | None:
        output = self._session.get_outputs()[[o.name for o in self._session.get_outputs()].index(self._output())]
        if output.name != "logits" or len(output.shape) != 3:
            return None
        ending, ids = _ending(self._graph.parent), list(tokens)
        for _ in range(count):
            ids.append(int(np.argmax(self._run(["logits"], self._feeds(ids))[0][0, -1])))
            if ids[-1] in ending:
                break
        return ids[len(tokens) :]

    def modules(self, tokens: Tokens) -> dict[str, torch.Tensor] | None:
        """Outputs of the modules whose place the graph's metadata records."""
        import torch

        mark = read_mark(self._graph, self._model)
        outlets = read_outlets(self._graph, mark)
        names = list(dict.fromkeys(outlet.value for outlet in outlets))
        if not names:
            return None
        values = {value.name: value for node in self._model.graph for value in node.outputs}
        known = [name for name in names if name in values]
        already = {output.name for output in self._model.graph.outputs}
        self._model.graph.outputs.extend([values[name] for name in known if name not in already])
        session = self._open_changed()
        found = dict(zip(known, session.run(known, self._feeds(tokens), self._options()), strict=True))
        outputs: dict[str, torch.Tensor] = {}
        for outlet in outlets:
            if outlet.value in found:
                part = found[outlet.value][..., outlet.at : outlet.at + outlet.count]
                outputs[outlet.module] = torch.from_numpy(np.asarray(part, np.float64))
        return outputs

    def close(self) -> None:
        del self._session, self._adapter, self._model

    def _output(self) -> str:
        names: list[str] = [output.name for output in self._session.get_outputs()]
        return "logits" if "logits" in names else names[0]

    def _options(self) -> Any:
        options = self._ort.RunOptions()
        if self._adapter is not None and self.active:
            options.add_active_adapter(self._adapter)
        return options

    def _run(self, outputs: list[str], feeds: dict[str, Array]) -> list[Array]:
        found: list[Array] = self._session.run(outputs, feeds, self._options())
        return found

    def _feeds(self, tokens: Tokens) -> dict[str, Array]:
        length = len(tokens)
        known = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "token_type_ids": np.zeros((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "decoder_input_ids": np.array([tokens], np.int64),
        }
        feeds = {}
        for wanted in self._session.get_inputs():
            if wanted.name in known:
                feeds[wanted.name] = known[wanted.name]
            elif wanted.type in _FLOATS and "past" in wanted.name:
                shape = [_dimension(size, index, self._sizes) for index, size in enumerate(wanted.shape)]
                feeds[wanted.name] = np.zeros(shape, _FLOATS[wanted.type])
            else:
                raise OnnxError(f"{self._graph}: wants input {wanted.name} {wanted.shape}, which text does not give")
        return feeds

    def _settings(self) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 3  # one warning for every optional input otherwise
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other models run in turn
        if threads() < (os.cpu_count() or 1):
            settings.intra_op_num_threads = threads()
        return settings

    def _open(self, graph: Path) -> Any:
        try:
            return self._ort.InferenceSession(str(graph), self._settings(), providers=self._providers)
        except Exception as problem:  # ONNX Runtime's own classes
            where = "" if "CUDA" in self._providers[0] else "; some precisions run on a GPU only, try --device cuda"
            raise OnnxError(f"{graph}: ONNX Runtime cannot load it: {_line(problem)}{where}") from problem

    def _open_exact(self) -> Any:
        from fossil_export.verifying._quantized import raise_level

        raise_level(self._model)
        try:
            return self._open_changed()
        except Exception as problem:  # ONNX Runtime's own classes
            raise OnnxError(f"{self._graph}: ONNX Runtime cannot load it: {_line(problem)}") from problem

    def _open_changed(self) -> Any:
        import onnx_ir as ir

        settings = self._settings()
        settings.log_severity_level = 4  # what goes wrong is raised
        key = "session.model_external_initializers_file_folder_path"
        settings.add_session_config_entry(key, str(self._graph.parent.absolute()))
        content = ir.to_proto(self._model).SerializeToString()
        files = external_files(self._model)
        try:
            return self._ort.InferenceSession(content, settings, providers=self._providers)
        except Exception:  # ONNX Runtime 1.20 looks for external data that it maps in the working directory
            if not files:
                raise
        with scratch_folder() as folder:
            (folder / self._graph.name).write_bytes(content)
            for file in files:
                link = folder / file.relative_to(self._graph.parent)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.absolute())  # later versions, which refuse this, need no file
            graph = str(folder / self._graph.name)
            return self._ort.InferenceSession(graph, settings, providers=self._providers)


def providers(device: str) -> list[str]:
    """ONNX Runtime's execution providers for a device; a missing GPU is never quietly the CPU."""
    ort = required("onnxruntime")
    if not device.startswith("cuda"):
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise FossilExportError(
            device_missing(
                device,
                "this onnxruntime has no CUDA provider: it is not onnxruntime-gpu, or a plain onnxruntime hides that",
            )
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _dimension(size: Any, index: int, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    if index == 0:
        return 1
    return sizes.get("head_size", 0) if index == 3 else 0


def _sizes(folder: Path) -> dict[str, int]:
    path = folder / "genai_config.json"
    if not path.is_file():
        return {}
    size: Any = read_json(path, OnnxError)
    for key in ("model", "decoder", "head_size"):
        size = size.get(key) if isinstance(size, dict) else None
    if size is None:
        return {}
    if type(size) is not int or not 0 <= size < 2**20:
        raise OnnxError(f"{path}: head_size is {str(size)[:100]}, no number of values; export the graph again")
    return {"head_size": size}


def _ending(folder: Path) -> set[int]:
    """Token ids that end a text, by the configs beside the graph."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name, OnnxError).get("eos_token_id")
            found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return found


def _line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)
