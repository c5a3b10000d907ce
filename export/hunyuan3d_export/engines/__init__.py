"""TensorRT: its libraries behind one seam, plans on this machine's GPU, and what a build shows and logs."""
