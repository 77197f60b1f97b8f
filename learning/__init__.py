"""The model's side: bases, adapters, tasks, metrics; no file of a hospital is read here."""
