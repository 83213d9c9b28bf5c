"""GPUs: the one seam behind which CUDA is touched, what stands on the other side, and a fake."""
