"""ONNX: the adapter in a graph. `builders/` bring the plain graph, `graph/` says what is in it, `_places` which
weight of it belongs to which module, `modes/` rewrite it; `_plan` decides, `_export` does it all."""
