"""The shipped corpora and tokenizers, and the reader of other texts."""
