"""A Hugging Face Hub on 127.0.0.1 for the real client, which misbehaves on demand (see README.md)."""

from loopback.client import environment, point_client_at
from loopback.faults import Fault, Request
from loopback.hub import LoopbackHub
from loopback.server import Handler

__all__ = ["Fault", "Handler", "LoopbackHub", "Request", "environment", "point_client_at"]
