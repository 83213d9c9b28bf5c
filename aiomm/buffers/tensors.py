"""Tensors on one side, bytes on the other, and no copy in between where none is needed."""
