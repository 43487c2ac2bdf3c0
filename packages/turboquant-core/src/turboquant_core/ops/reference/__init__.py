"""Every operation in plain PyTorch: what a kernel is compared with, and what runs where there is no GPU."""
