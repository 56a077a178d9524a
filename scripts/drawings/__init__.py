"""The drawings in ``docs/figures/``, a module each."""
