"""Rows as MLflow runs, from committed records and, while they train, from growing curves. Nothing else imports mlflow.

A table is an experiment, a row a run; what identifies a run are its row and the digest of its settings.
"""
