"""In PYTHONPATH, lets torchvision's wheel, whose compiled part needs CUDA, be imported beside a torch without CUDA."""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
