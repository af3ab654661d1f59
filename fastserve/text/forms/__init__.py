"""Forms of tool calls: how models of each family write a call into their text. One file for each form.

`find.py` lists them. `form.py` is the contract, `scanner.py` reads text that comes in pieces, `calls.py` has what
several forms share, and `parser.py` makes the parts of an answer with one of them.
"""
