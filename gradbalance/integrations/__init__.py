"""The penalty as one line in the ``callbacks=[...]`` of a trainer.

Each module needs the package that it is named after, and is imported by its own name:
:mod:`gradbalance.integrations.transformers` and :mod:`gradbalance.integrations.lightning`.
"""
