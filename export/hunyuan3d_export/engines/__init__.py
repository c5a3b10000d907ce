"""TensorRT: the two libraries behind one interface, plans on this machine's GPU, and the progress and log of a build."""
