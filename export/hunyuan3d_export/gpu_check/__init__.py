"""`make gpu-check`: one run on a GPU machine that measures the denoiser's speed, beside the GPU's roofline, and its errors.

The check needs torch, einops, numpy, onnx and onnxruntime. Each further package that is installed adds rows to the table.
"""
