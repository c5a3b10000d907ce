"""Starts the real tritonserver on this machine, and finds the models of a repository that a server can load."""
