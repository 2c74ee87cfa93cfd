"""Models on disk and on the network: files, tensors, tokenizer tables, finding a directory, downloads."""
