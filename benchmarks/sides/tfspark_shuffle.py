"""tfspark with the engine `shuffle`."""

import tfspark_side

tfspark_side.train("shuffle")
