"""ONNX: the adapter in a graph. `source` brings the plain graph, `sites` and `locate` say which node is which
module, `plan` decides, one file per mode rewrites, `api` does it all."""
