"""Single steps without the pipeline: ``prune``, ``train``, ``update`` and ``validate``; ``shrink``.

Every flag of the first four is a setting of :mod:`maskllm4v.config`, by the original's name where it has one, and each
calls what the stage of that step calls, so a command and a row with the same settings give the same tensors.
"""
