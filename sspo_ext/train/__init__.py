"""Thin trainer on transformers.Trainer: data, collator, trainer."""
