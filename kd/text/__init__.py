"""Text as networks take it: tokenizers, chat templates, packing."""
