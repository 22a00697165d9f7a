"""Other ways to compute the operators, each in the form that its documentation recommends.

`unfused` gathers a row per edge; `sparse` lets torch.sparse walk the rows; `dgl` where it is.
"""
