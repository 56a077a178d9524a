"""Commands: single steps without the pipeline, and what looks after its results.

Flags of ``prune``, ``train``, ``update`` and ``validate`` are settings of :mod:`maskllm4v.config`, by the original's
name where it has one. Each command calls what the stage of that step calls, so that a command and a row with the same
settings give the same tensors.
"""
