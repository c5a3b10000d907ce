"""Turns Hunyuan3D-2's weights into ONNX graphs, TensorRT plans and a Triton model repository: one file for each conversion."""
