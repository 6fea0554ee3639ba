"""Running a model as blocks, with its interface intact and a proof of what was promised.

`patterns` finds the chains of operators that can be replaced; `structural` and `conditional` are what replaces them;
`kernel_choice` measures how each is run fastest; `convert` swaps them in a copy of the model; `certificate` checks that the
copy computes what its plan says.
"""
