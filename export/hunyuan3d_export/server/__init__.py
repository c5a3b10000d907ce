"""The real tritonserver on this machine, and which models of a repository it can load."""
