"""A network that the project does not know: its folder, its row, and its row of the contract. Nothing else is written for it."""
