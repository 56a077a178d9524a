"""Commands: single steps without the pipeline, and what looks after its results.

Every flag of ``prune``, ``train``, ``update`` and ``validate`` is a setting of :mod:`maskllm4v.config`, by the original's
name where it has one, and each calls what the stage of that step calls, so a command and a row with the same settings
give the same tensors.
"""
