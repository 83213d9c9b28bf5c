"""What torch and numpy are needed for here, and the only place that imports them.

Neither is imported before it is needed, and numpy is enough where torch is absent and no
dtype asks for it.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..types import Field

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = [
    "Array",
    "array_of_bytes",
    "array_over",
    "load_array_library",
    "loaded_instance",
]

Array: TypeAlias = "torch.Tensor | numpy.ndarray[Any, Any]"


@functools.cache
def load_array_library() -> ModuleType:
    """Import and return torch, or numpy where there is no torch.

    It takes up to seconds: call it once, off the loop, before the first tensor is needed.

    Raises:
        ImportError: there is neither.
    """
    for name in ("torch", "numpy"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # OSError: a shared library of it is missing
            continue
    raise ImportError("received tensors are torch tensors or numpy arrays: install one of them")


def loaded_instance(candidate: object, module: str, class_name: str) -> bool:
    """Whether `candidate` is an instance of that class; False while nobody imported `module`."""
    loaded = getattr(sys.modules.get(module), class_name, None)
    return loaded is not None and isinstance(candidate, loaded)


def array_over(memory: memoryview, field: Field, num_tokens: int) -> Array:
    """Return a `[num_tokens, *field.shape]` array over the first bytes of `memory`, not a copy.

    Raises:
        ImportError: no installed library has the dtype.
    """
    library = load_array_library()
    shape = (num_tokens, *field.shape)
    if library.__name__ == "torch":
        dtype = getattr(library, field.dtype, None)
        if dtype is None:
            raise ImportError(f"torch {library.__version__} has no {field.dtype}; a later one has")
        if not num_tokens:
            return library.empty(shape, dtype=dtype)  # type: ignore[no-any-return]
        flat = library.frombuffer(memory, dtype=dtype, count=math.prod(shape))
        return flat.view(shape)  # type: ignore[no-any-return]
    try:
        return library.frombuffer(  # type: ignore[no-any-return]
            memory, dtype=library.dtype(field.dtype), count=math.prod(shape)
        ).reshape(shape)
    except TypeError as exc:
        raise ImportError(f"numpy has no {field.dtype}: install torch") from exc


def array_of_bytes(flat: Any, field: Field, num_tokens: int) -> Array:
    """Return a `[num_tokens, *field.shape]` array over a flat array of bytes, not a copy.

    Raises:
        ImportError: the library of `flat` has no such dtype.
    """
    library = importlib.import_module(type(flat).__module__.partition(".")[0])
    shape = (num_tokens, *field.shape)
    try:
        is_torch = library.__name__ == "torch"
        dtype = getattr(library, field.dtype) if is_torch else library.dtype(field.dtype)
        return flat.view(dtype).reshape(shape)  # type: ignore[no-any-return]
    except (AttributeError, TypeError) as exc:
        raise ImportError(f"{library.__name__} has no {field.dtype}: install torch") from exc
