"""What only real GPUs can show of GPU pools: see :mod:`.__main__`."""
