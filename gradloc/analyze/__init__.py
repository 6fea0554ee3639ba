"""Evidence into answers: locality curves, criteria with p-values, and which dependencies to keep.

A *criterion* scores each dependency of a parameter; a *null* says what an unsupported dependency goes back to; a
*correction* turns p-values into decisions over all of them; a *selection* is what stays.
"""
