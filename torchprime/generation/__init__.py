"""Generation: prefill and decode with a static cache, conversations, answers by transformers."""
