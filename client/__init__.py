"""The hospital's side: the only code that may see a record, modules in the order of the data."""
