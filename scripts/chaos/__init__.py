"""``make chaos``: what breaks, at random, on a shortened chain of stages."""
