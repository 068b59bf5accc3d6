"""ONNX: the adapter in a graph. `builders/` bring the plain graph, `graph/` says what is in it, `places` which weight
of it belongs to which module, `modes/` rewrite it; `plan` decides, `export` does it all."""
