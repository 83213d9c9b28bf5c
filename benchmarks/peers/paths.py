"""Every adapter by the name of its path, the floors first and aiomm last."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    aiomm_planes,
    connection,
    floor,
    gloo,
    mooncake,
    nixl,
    pickled_zmq,
    raw_tcp,
    safetensors_file,
    torch_queue,
    zmq_frames,
)
from .base import Adapter

PATHS: Mapping[str, Adapter] = {
    **floor.PATHS,
    **pickled_zmq.PATHS,
    **zmq_frames.PATHS,
    **torch_queue.PATHS,
    **connection.PATHS,
    **mooncake.PATHS,
    **nixl.PATHS,
    **gloo.PATHS,
    **safetensors_file.PATHS,
    **raw_tcp.PATHS,
    **aiomm_planes.PATHS,
}
