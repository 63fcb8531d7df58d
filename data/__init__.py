"""Datasets: the on-disk format, tokenizers, corpora, and one folder a dataset with its prepare.py."""
