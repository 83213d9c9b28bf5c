"""safetensors files on their way out and in.

A file travels in one of two forms. *Whole*: its bytes, in rows of 4096, with its length in the
metadata; any file, and neither side has to know what is in it. *By fields*: each tensor is a
field of the schema and its first dimension counts tokens; so a file can be sent to any
receiver, and whatever any sender sends can be kept as a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from ..errors import IncompatibleSchema
from ..receiver import Lease
from ..types import Field, Schema
from .running import Unusable

if TYPE_CHECKING:
    import numpy
    import numpy.typing as npt

__all__ = [
    "OWN_PREFIX",
    "WHOLE_FILE",
    "Outgoing",
    "check_header",
    "field_from",
    "field_option",
    "file_stem",
    "read_fields",
    "read_whole",
    "request_id_of",
    "save",
]

ROW_NBYTES = 4096
WHOLE_FILE = Schema(file=Field("uint8", ROW_NBYTES))
"""The schema of a file that travels whole."""

OWN_PREFIX = "aiomm."
NBYTES = f"{OWN_PREFIX}nbytes"
"""Metadata key: length of a whole file."""
MAX_STEM_NBYTES = 200


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file that has been read."""

    schema: Schema
    tensors: Mapping[str, Any]
    metadata: dict[str, Any]
    num_tokens: int


def field_from(text: str) -> tuple[str, Field]:
    """Read `NAME=DTYPE[:DIMS]`, such as `mrope_positions=int32:3` or `deepstack=float16:4x2048`.

    Raises:
        ValueError: it is not of this form, or the dtype is unknown.
    """
    name, equals, rest = text.partition("=")
    dtype, colon, dims = rest.partition(":")
    if not (name and equals and dtype) or (colon and not re.fullmatch(r"\d+([x,]\d+)*", dims)):
        form = "NAME=DTYPE[:DIMS], such as ids=int32 or embeddings=bfloat16:3584"
        message = f"a field is {form}, not {text!r}"
        raise ValueError(message)
    return name, Field(dtype, *(int(dim) for dim in re.split("[x,]", dims) if dim))


def field_option(name: str, field: Field) -> str:
    """Return the option that stands for a field."""
    dims = "x".join(map(str, field.shape))
    return f"--field {name}={field.dtype}{':' if dims else ''}{dims}"


def request_id_of(path: Path) -> str:
    """Return the request id of a file that is given none: its name without `.safetensors`."""
    return path.name.removesuffix(".safetensors") or path.name


def check_header(path: Path) -> None:
    """Raise Unusable unless `path` is a safetensors file. Loads no torch."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (OSError, safetensors.SafetensorError) as exc:
        raise Unusable(f"{path} is no safetensors file that can be read: {exc}") from exc


def read_whole(path: Path) -> Outgoing:
    """Read a file to send it as it is.

    Raises:
        Unusable: it cannot be read, or is no safetensors file.
    """
    import numpy as np

    check_header(path)
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        num_rows = -(-nbytes // ROW_NBYTES)
        rows = np.empty((num_rows, ROW_NBYTES), np.uint8)
        flat = rows.reshape(-1)
        flat[nbytes:] = 0
        if file.readinto(flat.data[:nbytes]) != nbytes:
            raise Unusable(f"{path} became shorter while it was read")
    return Outgoing(WHOLE_FILE, {"file": rows}, {NBYTES: nbytes}, num_rows)


def read_fields(path: Path, schema: Schema | None = None) -> Outgoing:
    """Read a file to send its tensors as fields.

    Args:
        path: the file.
        schema: which tensors to send; None for all, as they are.

    Raises:
        Unusable: it is no safetensors file, its tensors have no first dimension in common, or
            they do not match `schema`.
    """
    import safetensors

    check_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys() if schema is None else schema)
        absent = [name for name in names if name not in set(file.keys())]
        if absent:
            raise Unusable(f"{path} has no tensor {', '.join(map(repr, absent))}")
        tensors = {name: file.get_tensor(name) for name in names}
    found = _schema_of(path, tensors)
    difference = "" if schema is None else schema.difference(found)
    if difference:
        raise Unusable(f"{path} does not have the fields asked for: {difference}")
    return Outgoing(found, tensors, metadata, len(next(iter(tensors.values()))))


def _schema_of(path: Path, tensors: Mapping[str, Any]) -> Schema:
    scalars = [name for name, tensor in tensors.items() if not tensor.ndim]
    if scalars:
        raise Unusable(f"{path}: {scalars[0]!r} is a scalar, and has no dimension of tokens")
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise Unusable(f"{path}: the first dimension must be the same in all tensors; {told}")
    try:
        return Schema(
            **{
                name: Field(str(tensor.dtype).removeprefix("torch."), *tensor.shape[1:])
                for name, tensor in tensors.items()
            }
        )
    except IncompatibleSchema as exc:
        raise Unusable(f"{path} cannot be sent by fields: {exc}") from exc


def save(lease: Lease, folder: Path) -> Path:
    """Write what arrived to `<request id>.safetensors` in `folder`, whole or not at all.

    A file of that name is replaced. Blocks.

    Raises:
        Unusable: it is not what `aiomm send` sends.
        OSError: it cannot be written.
    """
    target = folder / f"{file_stem(lease.request_id)}.safetensors"
    temporary = folder / f".aiomm-{secrets.token_hex(8)}.part"
    try:
        if list(lease) == list(WHOLE_FILE) and NBYTES in lease.metadata:
            _write_whole(lease, temporary)
        else:
            _write_fields(lease, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _write_whole(lease: Lease, path: Path) -> None:
    nbytes = lease.metadata[NBYTES]
    if type(nbytes) is not int or not 0 <= lease.num_tokens * ROW_NBYTES - nbytes < ROW_NBYTES:
        raise Unusable(f"{lease.request_id!r} says it has {nbytes!r} bytes, and has not")
    path.write_bytes(_flat(lease["file"]).data[:nbytes])
    try:
        check_header(path)
    except Unusable as exc:
        raise Unusable(f"what arrived as {lease.request_id!r} is no safetensors file") from exc


def _flat(rows: Any) -> npt.NDArray[numpy.uint8]:
    array = rows.numpy() if hasattr(rows, "numpy") else rows
    flat: npt.NDArray[numpy.uint8] = array.reshape(-1)
    return flat


def _write_fields(lease: Lease, path: Path) -> None:
    import safetensors
    import safetensors.torch
    import torch

    metadata = {
        str(key): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in lease.metadata.items()
        if not str(key).startswith(OWN_PREFIX)
    }
    tensors = {name: torch.as_tensor(tensor) for name, tensor in lease.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata=metadata or None)
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise Unusable(f"{lease.request_id!r} cannot be a safetensors file: {exc}") from exc


def file_stem(request_id: str) -> str:
    """Return a file name that stands for `request_id` alone, in one folder, on any system."""
    stem = re.sub(r"[^\w.,=@+-]", lambda match: quote(match[0], safe=""), request_id)
    stem = re.sub(r"^\.", "%2E", stem)  # no hidden file
    encoded = stem.encode()
    if len(encoded) <= MAX_STEM_NBYTES:
        return stem
    digest = hashlib.sha256(request_id.encode()).hexdigest()[:16]
    return f"{encoded[: MAX_STEM_NBYTES - 17].decode(errors='ignore')}-{digest}"
