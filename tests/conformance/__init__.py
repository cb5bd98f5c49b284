"""PyTorch's own databases of operators, modules and optimizers, played over every layout.

    python -m tests.conformance          # everything; the counts, the faults by operator, and a JSON of all rows
    python -m tests.conformance --sample # the rows that `make test` runs

The oracle is the dense twin: the same call with every sparse argument replaced by its dense tensor (`classify`).
`known.json` lists the faults of today, which the tests allow and which can only become fewer.
"""
