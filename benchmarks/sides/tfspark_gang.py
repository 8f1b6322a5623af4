"""tfspark with the engine `gang`."""

import tfspark_side

tfspark_side.train("gang")
