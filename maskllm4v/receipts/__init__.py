"""Receipts: what a table came out as on one machine, compared with the commit, row by row.

They hold no results and nothing private. This machine's lies in ``receipt-<table>.json``; those that others may see in
``reports/receipts/``, from where the README's table of CPUs and the captions are made. Nothing here imports torch or
NumPy.
"""

from maskllm4v.receipts.build import build_receipt, receipt_file, write_receipt
from maskllm4v.receipts.model import CPU, Difference, Receipt, Row

__all__ = [
    "CPU",
    "Difference",
    "Receipt",
    "Row",
    "build_receipt",
    "receipt_file",
    "write_receipt",
]
