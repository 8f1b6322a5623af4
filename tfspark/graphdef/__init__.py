"""Pure graphs: how they are made of graphs with variables and randomness, and how they run."""
