"""From documents to batches: sources, tokenizer, prepared token files, packing, and the batch pipeline."""
