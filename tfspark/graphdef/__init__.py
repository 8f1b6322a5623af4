"""Pure graphs: how they are made of graphs with variables and randomness, and how they run."""

from tfspark.graphdef.quiet import import_tensorflow

import_tensorflow()  # before any module of this package does
