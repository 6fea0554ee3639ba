"""Taking unsupported dependencies away while training goes on.

A *schedule* turns progress into a factor from 1 to 0; a *target* applies that factor (to weights of a mask, or to the
blocks a router doesn't pick); a *gate* watches validation and decides to go on, roll back or stop; the *annealer* runs
the three after each optimizer step.
"""
