"""Removes the background of photographs: a saliency network from an ONNX file, behind one interface for every such file."""
