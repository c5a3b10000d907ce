"""`make gpu-check`: one run on a GPU machine that measures what can be measured there, beside its roofline.

Needs torch, einops, numpy, onnx and onnxruntime; everything else adds rows where it is installed.
"""
