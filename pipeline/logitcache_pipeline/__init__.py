"""From a corpus to a cache of teacher log-probs: tokenize, plan, score, commit."""
