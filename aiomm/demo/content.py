"""Tensors that both processes can make from a number, so that every byte can be compared.

Row `t` of the embeddings is row `t % 1021` of random bytes that belong to the request; 1021 is
prime, so no block of a request looks like another block of it. The other fields hold the
token's own position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import Field, Schema

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["difference", "make", "on_device", "schema_of"]

PERIOD = 1021
COLUMNS = 32
"""Tokens per line of the imaginary picture."""


def schema_of(hidden: int) -> Schema:
    """Return the schema of embeddings that are `hidden` wide."""
    return Schema(
        input_embeddings=Field("bfloat16", hidden),
        fill_ids=Field("int32"),
        mrope_positions=Field("int32", 3),
    )


def make(number: int, num_tokens: int, hidden: int) -> dict[str, torch.Tensor]:
    """Return the tensors of request `number`. Blocks for about 1 ms per MiB."""
    import torch

    rows = _random_rows(number, hidden)
    embeddings = np.empty((num_tokens, 2 * hidden), np.uint8)
    for start in range(0, num_tokens, PERIOD):
        piece = embeddings[start : start + PERIOD]
        piece[:] = rows[: len(piece)]
    return {
        "input_embeddings": torch.from_numpy(embeddings.view(np.uint16)).view(torch.bfloat16),
        "fill_ids": torch.from_numpy(_fill_ids(number, 0, num_tokens)),
        "mrope_positions": torch.from_numpy(_positions(number, 0, num_tokens)),
    }


def on_device(tensors: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Return the tensors on a device, as far as torch knows it; it does not know a fake one."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def difference(tensors: Mapping[str, Any], number: int, num_tokens: int, hidden: int) -> str | None:
    """Say where `tensors` are not those of request `number`; None if every byte is as it was.

    Compares piece by piece, so it needs little memory. Blocks for about 1 ms per MiB.
    """
    for name in schema_of(hidden):
        if len(tensors[name]) != num_tokens:
            return f"{name} has {len(tensors[name])} tokens, {num_tokens} were sent"
    if not num_tokens:
        return None
    rows = _random_rows(number, hidden)
    received = {name: _as_bytes(tensors[name]) for name in schema_of(hidden)}
    for start in range(0, num_tokens, PERIOD):
        stop = min(start + PERIOD, num_tokens)
        expected: dict[str, npt.NDArray[Any]] = {
            "input_embeddings": rows[: stop - start],
            "fill_ids": _as_bytes(_fill_ids(number, start, stop)),
            "mrope_positions": _as_bytes(_positions(number, start, stop)),
        }
        for name, each in received.items():
            if not np.array_equal(each[start:stop], expected[name]):
                return f"{name} differs in tokens [{start}, {stop})"
    return None


def _random_rows(number: int, hidden: int) -> npt.NDArray[np.uint8]:
    words = -(-PERIOD * hidden * 2 // 8)
    random = np.random.Generator(np.random.SFC64(number))
    flat = random.integers(0, 2**64, words, np.uint64).view(np.uint8)
    return flat[: PERIOD * hidden * 2].reshape(PERIOD, hidden * 2)


def _fill_ids(number: int, start: int, stop: int) -> npt.NDArray[np.int32]:
    return np.arange(start, stop, dtype=np.int32) + np.int32(number * 7919)


def _positions(number: int, start: int, stop: int) -> npt.NDArray[np.int32]:
    tokens = np.arange(start, stop, dtype=np.int32)
    times = np.full_like(tokens, number)
    return np.stack([times, tokens // COLUMNS, tokens % COLUMNS], axis=1)


def _as_bytes(tensor: Any) -> npt.NDArray[np.uint8]:
    """Return a dense tensor `[num_tokens, ...]` as `[num_tokens, row_nbytes]`, not copied."""
    if hasattr(tensor, "untyped_storage"):
        import torch

        tensor = tensor.view(len(tensor), -1).view(torch.uint8).cpu().numpy()
    array: npt.NDArray[Any] = tensor
    return array.reshape(len(array), -1).view(np.uint8)
