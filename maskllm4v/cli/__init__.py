"""Single steps without the pipeline: ``prune``, ``train`` and ``validate``, with the original's flags; ``shrink``.

Every flag of the first three is a setting of :mod:`maskllm4v.config` and each calls what the stage of that step
calls, so a command and a row with the same settings give the same tensors.
"""
