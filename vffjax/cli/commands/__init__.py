"""The commands, one module each: its name is the command's, and the first line of its docstring is what `vffjax --help` says.

`run(arguments)` is given what follows the command's name and returns the exit status, or None for 0. It raises `UserError` for bad input.
At its top a module imports nothing that needs JAX: bad input is then refused at once, and `backend.start` can explain what is wrong with
JAX.
"""
