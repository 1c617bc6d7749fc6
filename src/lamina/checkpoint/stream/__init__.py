"""Merge an adapter into a model on disk, tensor by tensor, without ever building the model.

`files` reads, `names` says which tensors of the model a tensor in a file belongs to, `changes`
what the adapter does to each, `plan` what every byte of the result will be, `restart` keeps what a
killed merge has done, `run` does it, `sample` looks at the result with other arithmetic.
"""
