import torch

torch.set_num_threads(1)  # as in the processes that the tests start: the number of threads decides the rounding
