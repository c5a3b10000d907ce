"""A network that the project does not know: this folder, with the network's row of NETWORKS and its row of the contract."""
