"""One script a corpus: a data set from the Hugging Face hub, or local files in its schema, to JSONL."""
