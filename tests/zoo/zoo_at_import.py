"""A kernel whose import changes a setting of the process."""

import torch
from zoo_kernels import honest  # noqa: F401 (it is what is declared)

torch.set_float32_matmul_precision("high")
