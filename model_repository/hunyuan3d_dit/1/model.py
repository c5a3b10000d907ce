"""The Python runtimes' entry (configs/cpu.pbtxt); a TensorRT plan or the native ONNX Runtime backend needs none of it."""

from denoiser_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
