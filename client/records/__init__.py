"""A hospital's export, whatever its form, as records that all look alike.

Each reader streams: it holds one entry at a time, names file and line, row or segment in what it
says, and never shows what an entry holds. Whatever bytes it is given, it yields records, entries
that could not be read, or refuses cleanly.
"""
