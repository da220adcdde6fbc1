import torch

torch.set_num_threads(1)  # as run.py does: small tensors, and tests that run beside other programs
