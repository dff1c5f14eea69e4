"""Records -> examples -> packed, memory-mapped tokens -> batches.

Seam: prepare(config, tokenizer, objective) -> PreparedData; TokenStore.batch(ids) -> Batch; Example, which an objective
makes of a record. May import config, ranks and files; the objective comes in as an argument.
"""
