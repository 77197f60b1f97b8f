"""The coordinator's side: it never sees a record and needs no torch."""
