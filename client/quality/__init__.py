"""Whether records may teach: each problem is fixed, set apart or refused, none in silence.

What was changed or left out ends as a ``Problem`` that names code, place and field, never a value.
Units are converted, never guessed; limits bound what is possible, not what is healthy.
"""
