"""Single steps without the pipeline: ``prune``, ``train`` and ``validate``, with the original's flags.

Every flag is a setting of :mod:`maskllm4v.config` and every command calls what the stage of that step calls,
so a command and a row with the same settings give the same tensors.
"""
