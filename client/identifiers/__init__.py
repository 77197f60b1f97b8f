"""What names a person, found and replaced before anything is learned from it.

Everything here is local, offline and the same for the same input and key. What is found is
counted by kind and never told; what replaces it is of the same sort, so that a text still reads
like one, and belongs to no real person.
"""
