"""Engines: how gradients are summed, shards updated, and weights handed round."""
